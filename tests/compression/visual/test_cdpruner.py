from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.compression.visual.slow import cosine, largest_determinant, rows, run


def slow(features, count, emphasis=0.0):
    x, text = rows(features.projected), rows(features.text)
    score = [sum(cosine(token, word) for word in text) / len(text) for token in x]
    low, high = min(score), max(score)
    r = [1e-3 + (1 - 1e-3) * (value - low) / (high - low) for value in score]
    if emphasis:
        r = [math.exp(emphasis / (2 * (1 - emphasis)) * value) for value in r]
    n = len(x)
    return largest_determinant([[r[i] * cosine(x[i], x[j]) * r[j] for j in range(n)] for i in range(n)], count)


@pytest.mark.parametrize("emphasis", [0.0, 0.6])
@pytest.mark.parametrize(("count", "keep"), [(3, 1), (9, 4), (24, 8)])
def test_equals_choosing_by_determinants_computed_anew(count, keep, emphasis, make_features):
    features = make_features(count, seed=count)
    assert run("cdpruner", features, keep=keep, emphasis=emphasis)[1].tolist() == slow(features, keep, emphasis)


def test_without_text_it_is_the_selection_without_the_question(make_features):
    features = make_features(30)
    mute = dataclasses.replace(features, text=torch.zeros(0, 10))
    assert torch.equal(run("cdpruner", mute, keep=8)[1], run("dpp", features, keep=8)[1])
