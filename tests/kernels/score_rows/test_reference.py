from __future__ import annotations

import pytest
import torch

from prismserve.kernels.paged_attention import attend_with_lse, plan_batch
from prismserve.kernels.score_rows import plan_rows, score_dense_rows, score_rows


def written_out(q, keys, positions, scale):
    keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
    scores = torch.einsum("thd,shd->ths", q, keys) * scale
    hidden = torch.arange(keys.shape[0]) > torch.as_tensor(positions)[:, None]
    return scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)


@pytest.mark.parametrize("positions", [[20], [17, 18, 19, 20], [9, 0, 20], []])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_dense_rows_are_rows_of_the_softmax(positions, heads, kv_heads):
    q, keys = torch.randn(len(positions), heads, 16), torch.randn(21, kv_heads, 16)
    probabilities, _ = score_dense_rows(q, keys, positions, 0.25)
    torch.testing.assert_close(probabilities, written_out(q, keys, positions, 0.25))


def test_paged_rows_equal_dense_rows_with_the_sums_of_attention_and_without():
    layer = torch.randn(8, 2, 4, 2, 16)
    tables, positions = [[3, 1], [0], [5, 2, 4]], [[5, 6], [], [9, 10, 11]]
    q = torch.randn(5, 4, 16)
    batch = plan_rows(tables, positions, 4)
    probabilities, lse = score_rows(q, layer, batch, 0.25)
    assert probabilities.shape == (5, 4, 12)
    for rows, index in ((slice(0, 2), 0), (slice(2, 5), 2)):
        keys = layer[tables[index], 0].flatten(0, 1)
        expected = written_out(q[rows], keys, positions[index], 0.25)
        torch.testing.assert_close(probabilities[rows, :, : keys.shape[0]], expected)
        assert not probabilities[rows, :, keys.shape[0] :].any()
    _, known = attend_with_lse(q, layer, plan_batch([tables[0], tables[2]], [2, 3], [7, 12], 4), 0.25)
    torch.testing.assert_close(lse, known)
    torch.testing.assert_close(score_rows(q, layer, batch, 0.25, lse=known)[0], probabilities)


def test_wrong_positions_are_refused():
    with pytest.raises(ValueError, match="lengths must be equal"):
        plan_rows([[0]], [], 4)
    for position in (-1, 4):
        with pytest.raises(ValueError, match="must lie in 1 blocks of 4"):
            plan_rows([[0]], [[position]], 4)
