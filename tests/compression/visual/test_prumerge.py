from __future__ import annotations

import pytest
import torch

from tests.compression.visual.slow import attention, best, cosine, mean_of, rows, run


def slow(features, count, plus, spatial, neighbours, merge):
    a, x = attention(features), rows(features.tokens)
    keys = [mean_of(heads) for heads in rows(features.keys)]
    spread = round(spatial * count) if plus else 0
    chosen = best(a, count - spread)
    rest = [i for i in range(len(x)) if i not in chosen]
    chosen = sorted(chosen + [rest[(2 * i + 1) * len(rest) // (2 * spread)] for i in range(spread)])
    out = []
    for i in chosen:
        others = [j for j in range(len(x)) if j != i]
        near = sorted(others, key=lambda j: (-cosine(keys[i], keys[j]), j))[:neighbours]
        weights = [1.0, *(a[j] for j in near)]
        token = mean_of([x[i], *(x[j] for j in near)], weights)
        scale = {"mean": 1.0, "sum": sum(weights)}.get(merge)
        out.append(x[i] if scale is None else [scale * value for value in token])
    return chosen, out


@pytest.mark.parametrize("merge", ["mean", "sum", "none"])
@pytest.mark.parametrize(("plus", "spatial"), [(False, 0.75), (True, 0.75), (True, 1.0)])
@pytest.mark.parametrize(("count", "keep", "neighbours"), [(2, 1, 32), (9, 4, 3), (60, 24, 32)])
def test_equals_the_method_told_one_token_at_a_time(count, keep, neighbours, plus, spatial, merge, make_features):
    features = make_features(count, seed=count)
    chosen, out = slow(features, keep, plus, spatial, neighbours, merge)
    params = {"keep": keep, "plus": plus, "spatial": spatial, "neighbours": neighbours, "merge": merge}
    tokens, indices = run("prumerge", features, **params)
    assert indices.tolist() == chosen
    torch.testing.assert_close(tokens, torch.tensor(out), rtol=1e-5, atol=1e-5)
