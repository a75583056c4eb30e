from __future__ import annotations

import pytest

from tests.compression.visual.slow import attention, best, run


@pytest.mark.parametrize(("count", "keep"), [(2, 1), (60, 12), (60, 59)])
def test_keeps_the_most_attended(count, keep, make_features):
    features = make_features(count, seed=count)
    tokens, indices = run("cls_topk", features, keep=keep)
    assert indices.tolist() == sorted(best(attention(features), keep))
    assert (tokens == features.tokens[indices]).all()
