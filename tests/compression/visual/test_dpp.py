from __future__ import annotations

import pytest

from tests.compression.visual.slow import cosine, largest_determinant, rows, run


@pytest.mark.parametrize(("count", "keep"), [(2, 1), (9, 4), (24, 8)])
def test_equals_choosing_by_determinants_computed_anew(count, keep, make_features):
    features = make_features(count, seed=count)
    x = rows(features.projected)
    kernel = [[cosine(a, b) for b in x] for a in x]
    assert run("dpp", features, keep=keep)[1].tolist() == largest_determinant(kernel, keep)


def test_a_budget_beyond_the_rank_is_filled_in_order_of_index(make_features):
    features = make_features(30)
    _, indices = run("dpp", features, keep=25)
    assert len(set(indices.tolist())) == 25
