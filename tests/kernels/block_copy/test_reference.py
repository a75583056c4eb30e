from __future__ import annotations

import pytest
import torch

from prismserve.kernels.block_copy import gather_blocks, scatter_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
def test_what_is_gathered_can_be_scattered_elsewhere(dtype):
    pool = torch.randint(0, 100, (6, 2, 2, 4, 1, 8)).to(torch.uint8).to(dtype)
    source, target = torch.tensor([4, 1]), torch.tensor([0, 5])
    out = torch.empty(2, 2, 4, 1, 8, dtype=dtype)
    assert gather_blocks(pool[:, 1], source, out) is out
    assert torch.equal(gather_blocks(pool[:, 1], source).float(), out.float())
    assert torch.equal(out.float(), pool[source.tolist(), 1].float())
    before = pool.float()
    scatter_blocks(pool[:, 0], target, out)
    assert torch.equal(pool[target.tolist(), 0].float(), out.float())
    assert torch.equal(pool[:, 1].float(), before[:, 1])


def test_another_shape_or_dtype_is_refused():
    pool, groups = torch.zeros(3, 4), torch.tensor([0, 1])
    for blocks in (torch.zeros(1, 4), torch.zeros(2, 4, dtype=torch.float16), torch.zeros(4, 2).t()):
        with pytest.raises(ValueError, match="need a contiguous buffer"):
            scatter_blocks(pool, groups, blocks)
        with pytest.raises(ValueError, match="need a contiguous buffer"):
            gather_blocks(pool, groups, blocks)
