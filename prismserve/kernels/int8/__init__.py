"""8-bit quantisation of keys (per channel) and values (per token), and its inverse."""

from __future__ import annotations

import torch

from prismserve.kernels.affine import Quantised, token_groups
from prismserve.kernels.dispatch import use_triton
from prismserve.kernels.int8 import reference


def quantise_per_channel(
    x: torch.Tensor, group_tokens: int = 0, *, symmetric: bool = False, scale_dtype: torch.dtype = torch.float32
) -> Quantised:
    """One range per (group of tokens, head, channel); see :func:`reference.quantise_per_channel`."""
    if use_triton(x):
        from prismserve.kernels.int8 import triton

        return triton.quantise_per_channel(x, group_tokens, symmetric=symmetric, scale_dtype=scale_dtype)
    return reference.quantise_per_channel(x, group_tokens, symmetric=symmetric, scale_dtype=scale_dtype)


def dequantise_per_channel(
    quantised: Quantised, group_tokens: int = 0, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Invert :func:`quantise_per_channel`; see :func:`reference.dequantise_per_channel`."""
    if use_triton(quantised.codes):
        from prismserve.kernels.int8 import triton

        return triton.dequantise_per_channel(quantised, group_tokens, dtype=dtype)
    return reference.dequantise_per_channel(quantised, group_tokens, dtype=dtype)


def quantise_per_token(
    x: torch.Tensor, *, symmetric: bool = False, scale_dtype: torch.dtype = torch.float32
) -> Quantised:
    """One range per (token, head); see :func:`reference.quantise_per_token`."""
    if use_triton(x):
        from prismserve.kernels.int8 import triton

        return triton.quantise_per_token(x, symmetric=symmetric, scale_dtype=scale_dtype)
    return reference.quantise_per_token(x, symmetric=symmetric, scale_dtype=scale_dtype)


def dequantise_per_token(quantised: Quantised, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Invert :func:`quantise_per_token`; see :func:`reference.dequantise_per_token`."""
    if use_triton(quantised.codes):
        from prismserve.kernels.int8 import triton

        return triton.dequantise_per_token(quantised, dtype=dtype)
    return reference.dequantise_per_token(quantised, dtype=dtype)


__all__ = [
    "Quantised",
    "dequantise_per_channel",
    "dequantise_per_token",
    "quantise_per_channel",
    "quantise_per_token",
    "token_groups",
]
