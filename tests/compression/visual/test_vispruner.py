from __future__ import annotations

import pytest

from tests.compression.visual.slow import attention, best, cosine, rows, run


def slow(features, count, important, removed):
    x, a = rows(features.tokens), attention(features)
    chosen = best(a, round(important * count))
    rest = [i for i in range(len(x)) if i not in chosen]
    wanted = count - len(chosen)
    while len(rest) > wanted:
        first, second = rest[::2], rest[1::2]
        closest = {i: max((cosine(x[i], x[j]) for j in second), default=1.0) for i in first}
        leaving = sorted(first, key=lambda i: (-closest[i], i))[: min(removed, len(rest) - wanted)]
        rest = [i for i in rest if i not in leaving]
    return sorted(chosen + rest)


@pytest.mark.parametrize("important", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("count", "keep", "removed"), [(2, 1, 8), (9, 4, 2), (60, 12, 8), (60, 59, 8), (60, 3, 100)])
def test_equals_the_method_told_one_token_at_a_time(count, keep, removed, important, make_features):
    features = make_features(count, seed=count)
    _, indices = run("vispruner", features, keep=keep, important=important, removed_per_round=removed)
    assert indices.tolist() == slow(features, keep, important, removed)
