"""4-bit quantisation as Triton kernels; signatures and results are those of ``reference.py``."""

from __future__ import annotations

import torch

from prismserve.kernels.affine import Quantised
from prismserve.kernels.quantisation import INT4, dequantise, quantise_channels, quantise_rows


def quantise_per_channel(
    x: torch.Tensor, group_tokens: int = 0, *, scale_dtype: torch.dtype = torch.float32
) -> Quantised:
    """See the reference."""
    return quantise_channels(x, group_tokens, INT4, scale_dtype)


def dequantise_per_channel(
    quantised: Quantised, group_tokens: int = 0, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See the reference."""
    return dequantise(quantised, dtype, INT4, group_tokens)


def quantise_per_token(x: torch.Tensor, *, scale_dtype: torch.dtype = torch.float32) -> Quantised:
    """See the reference."""
    return quantise_rows(x, INT4, scale_dtype)


def dequantise_per_token(quantised: Quantised, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """See the reference."""
    return dequantise(quantised, dtype, INT4)
