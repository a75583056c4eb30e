from __future__ import annotations

import pytest

from tests.compression.visual.slow import cosine, rows, run


def slow(features, count):
    x = rows(features.projected)
    n = len(x)
    distance = [[1 - cosine(x[i], x[j]) for j in range(n)] for i in range(n)]
    chosen = [max(range(n), key=lambda i: (min(distance[i][j] for j in range(n) if j != i), -i))]
    while len(chosen) < count:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(distance[i][j] for j in chosen), -i)))
    return sorted(chosen)


@pytest.mark.parametrize(("count", "keep"), [(2, 1), (9, 4), (40, 12), (40, 39)])
def test_equals_max_min_selection_told_one_token_at_a_time(count, keep, make_features):
    features = make_features(count, seed=count)
    tokens, indices = run("divprune", features, keep=keep)
    assert indices.tolist() == slow(features, keep)
    assert (tokens == features.tokens[indices]).all()
