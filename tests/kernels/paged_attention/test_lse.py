from __future__ import annotations

import pytest
import torch

from prismserve.kernels.paged_attention import attend, attend_with_lse, plan_batch
from prismserve.kernels.paged_decode import paged_decode

TABLES = [[3, 1], [0], [5, 2, 4], [7], [6]]
Q_LENS, KV_LENS = [1, 2, 5, 1, 0], [7, 2, 12, 1, 3]


def test_output_is_that_of_attend_and_sums_are_those_of_the_scores():
    layer = torch.randn(8, 2, 4, 2, 16)
    q = torch.randn(9, 4, 16)
    batch = plan_batch(TABLES, Q_LENS, KV_LENS, 4)
    out, lse = attend_with_lse(q, layer, batch, 0.25)
    torch.testing.assert_close(out, attend(q, layer, batch, 0.25))
    row = 0
    for table, queries, cached in zip(TABLES, Q_LENS, KV_LENS, strict=True):
        keys = layer[table, 0].flatten(0, 1).repeat_interleave(2, dim=1)
        for index in range(queries):
            seen = cached - queries + index + 1
            scores = torch.einsum("hd,shd->hs", q[row], keys[:seen]) * 0.25
            torch.testing.assert_close(lse[row], scores.logsumexp(-1))
            row += 1


def test_two_halves_of_a_cache_merge_by_their_sums():
    layer = torch.randn(4, 2, 4, 1, 8)
    q = torch.randn(1, 3, 8)
    whole, _ = paged_decode(q, layer, torch.tensor([[0, 1, 2, 3]]), torch.tensor([16]), 0.3)
    parts = [paged_decode(q, layer, torch.tensor([t]), torch.tensor([8]), 0.3, with_lse=True) for t in ([0, 1], [2, 3])]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).unsqueeze(-1)
    torch.testing.assert_close((torch.stack([out for out, _ in parts]) * weights).sum(0), whole)


def test_an_unused_row_gives_zero_and_no_sum_even_over_garbage():
    layer = torch.full((1, 2, 4, 1, 8), float("nan"))
    out, lse = paged_decode(torch.randn(1, 2, 8), layer, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0]), 1.0,
                            with_lse=True)  # fmt: skip
    assert not out.any()
    assert lse is not None
    assert lse.isneginf().all()


@pytest.mark.parametrize("rows", [0, 2])
def test_a_plan_for_other_rows_is_refused(rows):
    with pytest.raises(ValueError, match="planned for 1 query rows"):
        attend_with_lse(torch.zeros(rows, 1, 8), torch.zeros(1, 2, 4, 1, 8), plan_batch([[0]], [1], [1], 4), 1.0)
