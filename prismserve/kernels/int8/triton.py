"""8-bit quantisation as Triton kernels; signatures and results are those of ``reference.py``."""

from __future__ import annotations

import torch

from prismserve.kernels.affine import Quantised
from prismserve.kernels.quantisation import AFFINE8, INT8, dequantise, quantise_channels, quantise_rows


def quantise_per_channel(
    x: torch.Tensor, group_tokens: int = 0, *, symmetric: bool = False, scale_dtype: torch.dtype = torch.float32
) -> Quantised:
    """See the reference; d must be even."""
    return quantise_channels(x, group_tokens, INT8 if symmetric else AFFINE8, scale_dtype)


def dequantise_per_channel(
    quantised: Quantised, group_tokens: int = 0, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See the reference."""
    return dequantise(quantised, dtype, AFFINE8 if quantised.offset is not None else INT8, group_tokens)


def quantise_per_token(
    x: torch.Tensor, *, symmetric: bool = False, scale_dtype: torch.dtype = torch.float32
) -> Quantised:
    """See the reference; d must be even."""
    return quantise_rows(x, INT8 if symmetric else AFFINE8, scale_dtype)


def dequantise_per_token(quantised: Quantised, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """See the reference."""
    return dequantise(quantised, dtype, AFFINE8 if quantised.offset is not None else INT8)
