from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.compression.visual.slow import best, close, mean_of, rows, run


@pytest.mark.parametrize("question", [0, 2])
@pytest.mark.parametrize(("count", "keep"), [(3, 2), (12, 5), (30, 29)])
def test_equals_products_told_one_by_one(count, keep, question, make_features):
    features = make_features(count, seed=count, question=question)
    patches, text, tokens = rows(features.aligned), rows(features.aligned_text), rows(features.tokens)
    score = [-sum(sum(a * b for a, b in zip(patch, t, strict=True)) for t in text) / len(text) for patch in patches]
    chosen = best(score, keep - 1)
    rest = [i for i in range(count) if i not in chosen]
    out = {**{i: tokens[i] for i in chosen}, rest[-1]: mean_of([tokens[i] for i in rest])}
    reduced, indices = run("trim", features, keep=keep)
    assert indices.tolist() == sorted(out)
    assert close(reduced, [out[i] for i in sorted(out)])


def test_one_token_is_the_best_patch_and_no_text_keeps_evenly_spaced_ones(make_features):
    features = make_features(20)
    score = -(features.aligned @ features.aligned_text.T).mean(1)
    assert run("trim", features, keep=1)[1].tolist() == [int(score.argmax())]
    mute = dataclasses.replace(features, aligned_text=torch.zeros(0, 6))
    assert run("trim", mute, keep=4)[1].tolist() == [2, 7, 12, 17]
