from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from prismserve.compression.loader import normalise, visual_method
from prismserve.core.errors import InvalidRequestError
from tests.compression.visual.slow import attention, best, cosine, largest_determinant, rows, run


def slow(features, count, theta=0.5, locality=0.5, radius=3.0):
    x, a = rows(features.projected), attention(features)
    columns = features.grid[1]
    if theta == "auto":
        share = [value / sum(a) for value in a]
        salient = math.exp(-sum(s * math.log(s) for s in share))
        theta = min(1.0, 2 * count / salient)
    r = [(value / max(a)) ** theta for value in a]

    def similar(i, j):
        squared = (i // columns - j // columns) ** 2 + (i % columns - j % columns) ** 2
        return cosine(x[i], x[j]) * (1 - locality + locality * math.exp(-squared / (2 * radius**2)))

    n = len(x)
    return largest_determinant([[r[i] * similar(i, j) * r[j] for j in range(n)] for i in range(n)], count)


@pytest.mark.parametrize(
    "params", [{}, {"theta": 0.0}, {"theta": "auto"}, {"theta": 2.0, "locality": 0.9, "radius": 1.0}]
)
@pytest.mark.parametrize(("grid", "keep"), [((1, 3), 1), ((3, 4), 4), ((5, 5), 8)])
def test_equals_choosing_by_determinants_computed_anew(grid, keep, params, make_features):
    features = make_features(grid[0] * grid[1], grid=grid, seed=keep)
    assert run("prism", features, keep=keep, **params)[1].tolist() == slow(features, keep, **params)


def test_at_theta_zero_without_locality_it_is_diversity_alone(make_features):
    features = make_features(30)
    diverse = run("prism", features, keep=8, theta=0.0, locality=0.0)[1]
    assert torch.equal(diverse, run("dpp", features, keep=8)[1])


def test_a_large_theta_ranks_by_attention_where_tokens_differ(make_features):
    features = make_features(12)
    different = dataclasses.replace(features, projected=torch.eye(12))
    _, indices = run("prism", different, keep=5, theta=4.0)
    assert indices.tolist() == sorted(best(attention(features), 5))


@pytest.mark.parametrize("params", [{"theta": -1.0}, {"theta": "much"}, {"locality": 2.0}, {"radius": 0.0}])
def test_parameters_out_of_range_are_refused_by_field(params):
    with pytest.raises(InvalidRequestError, match=next(iter(params))):
        normalise(visual_method("prism"), params, "compression.visual")


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize(("count", "keep"), [(9, 4), (30, 1), (30, 29)])
def test_folding_mixes_in_the_mean_of_the_tokens_most_like_a_survivor(count, keep, share, make_features):
    features = make_features(count, seed=count + keep)
    indices = run("prism", features, keep=keep)[1].tolist()
    tokens, same = run("prism", features, keep=keep, fold=share)
    assert same.tolist() == indices
    x = rows(features.projected)
    members = {survivor: [] for survivor in indices}
    for place in set(range(count)) - set(indices):
        members[max(indices, key=lambda survivor, place=place: (cosine(x[place], x[survivor]), -survivor))].append(
            place
        )
    for token, survivor in zip(tokens, indices, strict=True):
        own, others = features.tokens[survivor], members[survivor]
        mixed = (1 - share) * own + share * features.tokens[others].mean(0) if others else own
        assert torch.allclose(token, mixed, atol=1e-6)
        assert others or torch.equal(token, own)
