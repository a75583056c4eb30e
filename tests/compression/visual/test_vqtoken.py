from __future__ import annotations

import pytest
import torch

from prismserve.compression.visual.vqtoken import fill_empty
from tests.compression.visual.slow import close, cosine, mean_of, rows, run, video


def unit(vector):
    norm = sum(value * value for value in vector) ** 0.5
    return [value / norm for value in vector]


def slow(features, keep, rounds):
    x = rows(features.tokens)
    u, count = [unit(token) for token in x], len(x)
    centres, owner = [u[(2 * i + 1) * count // (2 * keep)] for i in range(keep)], None
    for _ in range(rounds):
        before, owner = owner, []
        for token in u:
            alike = [sum(a * b for a, b in zip(token, centre, strict=True)) for centre in centres]
            owner.append(alike.index(max(alike)))
        assert set(owner) == set(range(keep)), "the case leaves a cluster empty"
        held = centres
        if owner == before:
            break
        centres = [unit(mean_of([u[i] for i in range(count) if owner[i] == c])) for c in range(keep)]
    out = {}
    for number in range(keep):
        inside = [i for i in range(count) if owner[i] == number]
        most = max(cosine(u[i], held[number]) for i in inside)
        nearest = next(i for i in inside if cosine(u[i], held[number]) > most - 1e-5)
        out[nearest] = mean_of([x[i] for i in inside])
    return sorted(out), [out[place] for place in sorted(out)]


@pytest.mark.parametrize("rounds", [1, 10])
@pytest.mark.parametrize(("frames", "patches", "keep"), [(1, 20, 5), (4, 8, 6), (3, 6, 1)])
def test_equals_k_means_told_one_by_one(frames, patches, keep, rounds):
    features = video(frames, patches, seed=frames)
    tokens, indices = run("vqtoken", features, keep=keep, rounds=rounds)
    expected, values = slow(features, keep, rounds)
    assert indices.tolist() == expected
    assert close(tokens, values)


def test_an_empty_cluster_is_given_the_token_least_like_its_centre():
    likeness, owner = torch.tensor([0.9, 0.1, 0.5, 0.2]), torch.tensor([0, 1, 0, 0])
    fill_empty(likeness, owner, 4)
    assert owner.tolist() == [0, 1, 3, 2]


def test_equal_tokens_still_give_as_many_codes_as_asked_for():
    features = video(1, 6)
    same = type(features)(tokens=features.tokens[:1].repeat(12, 1), grid=(2, 3), seed=b"12345678", frames=2)
    tokens, indices = run("vqtoken", same, keep=5)
    assert len(indices) == 5
    assert torch.allclose(tokens, same.tokens[:5], atol=1e-6)
