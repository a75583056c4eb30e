from __future__ import annotations

import pytest
import torch

from tests.compression.visual.slow import best, cosine, rows, run, video


def slow(features, keep, similarity, window, chunk):
    x, frames = rows(features.tokens), features.frames
    patches = len(x) // frames
    flat = [[value for token in x[t * patches : (t + 1) * patches] for value in token] for t in range(frames)]
    staying = []
    for begin in range(0, frames, window):
        inside = range(begin, min(frames, begin + window))
        for t in inside:
            others = [cosine(flat[t], flat[u]) for u in inside if u != t]
            if t == begin + len(inside) // 2 or sum(others) / len(others) < similarity:
                staying.append(t)
    assert len(staying) * patches >= keep, "the case is too small for this"
    places, repeated = [], []
    for number, t in enumerate(staying):
        leader = staying[number - number % chunk]
        places += [t * patches + p for p in range(patches)]
        repeated += [
            cosine(x[t * patches + p], x[leader * patches + p]) if number % chunk else -9.0 for p in range(patches)
        ]
    return sorted(places[i] for i in best([-r for r in repeated], keep)), staying


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("frames", "keep", "similarity"), [(7, 20, 0.4), (20, 40, 0.3), (6, 24, 1.0)])
def test_equals_the_filters_told_one_by_one(frames, keep, similarity, seed):
    features = video(frames, 8, seed=seed)
    _, indices = run("longvu", features, keep=keep, similarity=similarity, window=5, chunk=4)
    expected, _ = slow(features, keep, similarity, 5, 4)
    assert indices.tolist() == expected


def test_frames_that_repeat_their_window_leave_first():
    features = video(1, 4)
    tokens = features.tokens.repeat(10, 1)
    tokens[7 * 4 : 8 * 4] = video(1, 4, seed=9).tokens
    still = type(features)(tokens=tokens, grid=(2, 2), seed=b"12345678", frames=10)
    _, indices = run("longvu", still, keep=8)
    assert {int(i) // 4 for i in indices} == {5, 7}, "the middle of the window and the one that differs"


def test_frames_come_back_where_the_budget_has_room_for_them():
    features = video(1, 4)
    still = type(features)(tokens=features.tokens.repeat(6, 1), grid=(2, 2), seed=b"12345678", frames=6)
    assert len(run("longvu", still, keep=23)[1]) == 23


def test_an_image_keeps_evenly_spaced_tokens():
    assert run("longvu", video(1, 12), keep=4)[1].tolist() == [1, 4, 7, 10]
    assert torch.equal(run("longvu", video(9, 6), keep=2)[1] % 6, torch.tensor([1, 4]))
