from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from prismserve.compression.visual import salience
from prismserve.compression.visual.salience import salience_of
from tests.compression.visual.slow import best, cosine, rows, run, video


def slow(features, proxy, ridge=0.1):
    """The proxy of every token, one after another."""
    x = rows(features.tokens)
    height, width = features.grid
    if proxy == "norm" and len(x) > 1:
        return [-math.sqrt(sum(value * value for value in row)) for row in x]
    if proxy in {"distance", "norm"}:
        mean = [sum(column) / len(x) for column in zip(*x, strict=True)]
        return [1 - cosine(row, mean) for row in x]
    if proxy == "leverage":
        full = features.tokens.double()
        gram = full.T @ full
        penalty = ridge * float((full @ full.T if len(x) <= len(x[0]) else gram).diagonal().mean())
        inverse = (gram + penalty * torch.eye(len(gram), dtype=torch.float64)).inverse()
        return [float(row @ inverse @ row) for row in full]
    found = []
    for place in range(len(x)):
        frame, within = divmod(place, height * width)
        row, column = divmod(within, width)
        near = [
            cosine(x[place], x[(frame * height + other) * width + beside])
            for other in range(max(0, row - 1), min(height, row + 2))
            for beside in range(max(0, column - 1), min(width, column + 2))
            if (other, beside) != (row, column)
        ]
        found.append(1 - sum(near) / max(1, len(near)))
    return found


@pytest.mark.parametrize("proxy", ["distance", "contrast", "leverage", "norm"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 3), (4, 5)])
@pytest.mark.parametrize("frames", [1, 3])
def test_equals_the_proxy_written_out(proxy, grid, frames, make_features):
    features = make_features(frames * grid[0] * grid[1], grid=grid, frames=frames, seed=frames)
    expected = torch.tensor(slow(features, proxy))
    assert torch.allclose(salience_of(features, proxy, 0.1, 0), expected, atol=1e-5)
    if len(expected) > 2:
        _, indices = run("salience", features, keep=2, proxy=proxy, sketch=0)
        assert indices.tolist() == sorted(best(expected.tolist(), 2))


def test_the_default_keeps_what_no_combination_of_the_others_explains():
    features = video(1, 12)
    assert run("salience", features, keep=4)[1].tolist() == sorted(best(slow(features, "leverage"), 4))


def test_norms_that_are_all_the_same_are_not_ranked_by(make_features):
    features = make_features(40)
    unit = features.tokens / features.tokens.norm(dim=1, keepdim=True)
    nearly = dataclasses.replace(features, tokens=unit * (1 + 0.001 * torch.arange(40)[:, None] / 40))
    assert torch.equal(
        run("salience", nearly, keep=6, proxy="norm")[1], run("salience", nearly, keep=6, proxy="distance")[1]
    )
    longest = dataclasses.replace(features, tokens=unit * (1 + torch.arange(40)[:, None]))
    assert run("salience", longest, keep=3, proxy="norm")[1].tolist() == [0, 1, 2]


def test_one_patch_unlike_all_others_stands_out(make_features):
    features = make_features(25, grid=(5, 5))
    alike = torch.ones(25, 8) + 0.01 * features.tokens
    alike[13] = torch.tensor([1.0, -1.0] * 4)
    for proxy in ("distance", "contrast", "leverage"):
        assert run("salience", dataclasses.replace(features, tokens=alike), keep=1, proxy=proxy)[1].tolist() == [13]


def test_a_sketch_is_the_leverage_of_fewer_dimensions_and_always_the_same(make_features):
    features = make_features(40)
    sketched = salience.signs(8, 3)
    assert torch.allclose(sketched.abs(), torch.tensor(3**-0.5))
    assert sketched.unique().numel() == 2
    narrow = dataclasses.replace(features, tokens=features.tokens @ sketched)
    assert torch.equal(salience_of(features, "leverage", 0.1, 3), salience_of(narrow, "leverage", 0.1, 0))
    for sketch in (0, 8, 9):
        assert torch.equal(salience_of(features, "leverage", 0.1, sketch), salience_of(features, "leverage", 0.1, 0))
    salience.signs.cache_clear()
    assert torch.equal(salience.signs(8, 3), sketched)
