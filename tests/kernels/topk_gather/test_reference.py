from __future__ import annotations

import pytest
import torch

from prismserve.kernels.dispatch import use_native_on, without_native
from prismserve.kernels.topk_gather import top_k, topk_gather


def test_the_best_come_in_their_order_and_ties_go_to_the_earlier():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0], [0.0, -0.0, 0.0, -1.0, float("-inf")]])
    assert top_k(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]
    assert top_k(scores, 2).tolist() == [[1, 3], [0, 1]]
    assert top_k(scores, 0).shape == (2, 0)


def test_every_head_gathers_its_own_tokens():
    scores, keys = torch.randn(2, 9), torch.randn(9, 2, 4)
    indices, (kept,) = topk_gather(scores, 4, keys)
    for head in range(2):
        assert torch.equal(kept[:, head], keys[indices[head], head])


@pytest.mark.parametrize("keep", [-1, 6])
def test_an_impossible_count_is_refused(keep):
    with pytest.raises(ValueError, match="keep must lie between 0 and the 5"):
        top_k(torch.zeros(1, 5), keep)


def test_other_scores_are_refused():
    with pytest.raises(ValueError, match=r"float32 \[H, N\]"):
        top_k(torch.zeros(5), 1)


@pytest.mark.skipif(not use_native_on(torch.device("cpu")), reason="no C++ compiler on this machine")
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (3, 50), (98, 196)])
def test_the_native_kernel_selects_what_plain_pytorch_selects_ties_included(rows, count):
    scores = torch.randint(0, max(2, count // 3), (rows, 2 * count)).float()
    for one in (scores[:, :count], scores[:, ::2]):
        for keep in {0, 1, count // 2, count}:
            native = top_k(one, keep)
            with without_native():
                assert torch.equal(top_k(one, keep), native)
