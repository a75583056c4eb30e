from __future__ import annotations

import pytest
import torch

from prismserve.kernels.rms_norm import add_rms_norm, rms_norm


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 64), (5, 2, 80), (7, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula(shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    x64 = x.double()
    expected = x64 / (x64.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_form_is_addition_then_norm(dtype):
    x, residual, weight = (torch.randn(3, 8).to(dtype) for _ in range(3))
    normed, total = add_rms_norm(x, residual, weight[0], 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight[0], 1e-6))
