"""8-bit floating point (e4m3) with one scale per token and head, and its inverse."""

from __future__ import annotations

import torch

from prismserve.kernels.affine import Quantised
from prismserve.kernels.dispatch import use_triton
from prismserve.kernels.fp8 import reference


def quantise_per_token(x: torch.Tensor, *, scale_dtype: torch.dtype = torch.float32) -> Quantised:
    """One range per (token, head); see :func:`reference.quantise_per_token`."""
    if use_triton(x):
        from prismserve.kernels.fp8 import triton

        return triton.quantise_per_token(x, scale_dtype=scale_dtype)
    return reference.quantise_per_token(x, scale_dtype=scale_dtype)


def dequantise_per_token(quantised: Quantised, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Invert :func:`quantise_per_token`; see :func:`reference.dequantise_per_token`."""
    if use_triton(quantised.codes):
        from prismserve.kernels.fp8 import triton

        return triton.dequantise_per_token(quantised, dtype=dtype)
    return reference.dequantise_per_token(quantised, dtype=dtype)


__all__ = ["Quantised", "dequantise_per_token", "quantise_per_token"]
