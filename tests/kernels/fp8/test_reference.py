from __future__ import annotations

import pytest
import torch

from prismserve.kernels import fp8


@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 64), (33, 2, 80)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_the_error_is_a_sixteenth_of_the_value(shape, scale_dtype):
    x = torch.randn(shape) * 3
    quantised = fp8.quantise_per_token(x, scale_dtype=scale_dtype)
    assert quantised.codes.dtype == torch.float8_e4m3fn
    error = (fp8.dequantise_per_token(quantised) - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, quantised.scale.float() * 2**-10) * 1.01).all()


def test_the_greatest_value_never_becomes_nan():
    x = torch.rand(1000, 1, 2) * 1e4
    assert fp8.dequantise_per_token(fp8.quantise_per_token(x, scale_dtype=torch.float16)).isfinite().all()


def test_zeros_come_back():
    x = torch.zeros(3, 1, 4)
    assert torch.equal(fp8.dequantise_per_token(fp8.quantise_per_token(x)), x)
