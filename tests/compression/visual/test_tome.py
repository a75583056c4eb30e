from __future__ import annotations

import pytest
import torch

from tests.compression.visual.slow import cosine, mean_of, rows, run


def slow(features, count, pairs_max):
    keys, x = [mean_of(heads) for heads in rows(features.keys)], rows(features.tokens)
    groups = [(i, [i]) for i in range(len(x))]
    while len(groups) > count:
        metric = [mean_of([keys[i] for i in members]) for _, members in groups]
        proposals = []
        for i in range(0, len(groups), 2):
            partner = max(range(1, len(groups), 2), key=lambda j: (cosine(metric[i], metric[j]), -j))
            proposals.append((-cosine(metric[i], metric[partner]), i, partner))
        gone = sorted(proposals)[: min(pairs_max, len(groups) - count, len(groups) // 2)]
        for _, i, partner in gone:
            groups[partner][1].extend(groups[i][1])
        gone_rows = {i for _, i, _ in gone}
        groups = [group for row, group in enumerate(groups) if row not in gone_rows]
    return [place for place, _ in groups], [mean_of([x[i] for i in members]) for _, members in groups]


@pytest.mark.parametrize(("count", "keep", "pairs"), [(2, 1, 8), (9, 4, 2), (61, 12, 8), (60, 59, 8), (60, 1, 100)])
def test_equals_the_method_told_one_token_at_a_time(count, keep, pairs, make_features):
    features = make_features(count, seed=count)
    places, out = slow(features, keep, pairs)
    tokens, indices = run("tome", features, keep=keep, merged_per_round=pairs)
    assert indices.tolist() == places
    torch.testing.assert_close(tokens, torch.tensor(out), rtol=1e-5, atol=1e-5)


def test_no_token_is_lost(make_features):
    features = make_features(40)
    tokens, _ = run("tome", features, keep=1)
    torch.testing.assert_close(tokens[0], features.tokens.mean(0))
