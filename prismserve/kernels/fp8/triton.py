"""e4m3 with one scale per token and head as Triton kernels; signatures and results are those of ``reference.py``."""

from __future__ import annotations

import torch

from prismserve.kernels.affine import Quantised
from prismserve.kernels.quantisation import FP8, dequantise, quantise_rows


def quantise_per_token(x: torch.Tensor, *, scale_dtype: torch.dtype = torch.float32) -> Quantised:
    """See the reference; d must be even."""
    return quantise_rows(x, FP8, scale_dtype)


def dequantise_per_token(quantised: Quantised, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """See the reference."""
    return dequantise(quantised, dtype, FP8)
