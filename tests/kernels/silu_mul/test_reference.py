from __future__ import annotations

import pytest
import torch

from prismserve.kernels.silu_mul import silu_mul


@pytest.mark.parametrize("shape", [(0, 4), (1, 2), (5, 160), (2, 3, 64)])
def test_equals_the_formula_and_leaves_its_input(shape):
    x = torch.randn(shape)
    before = x.clone()
    gate, up = x[..., : shape[-1] // 2], x[..., shape[-1] // 2 :]
    torch.testing.assert_close(silu_mul(x), gate / (1 + (-gate).exp()) * up)
    assert torch.equal(x, before)
