"""8-bit quantisation in plain PyTorch.

Keys have outlier channels and are quantised per channel over groups of tokens; values are quantised per token over
the channels of one head (KIVI, arXiv:2402.02750, section 3.2). Arithmetic is float32; rounding is half to even.
"""

from __future__ import annotations

import torch

from prismserve.kernels.affine import (
    Quantised,
    affine_scale,
    channel_ranges,
    check_groups,
    check_input,
    restore,
    spread,
    steps,
    symmetric_scale,
    token_groups,
)

__all__ = [
    "Quantised",
    "dequantise_per_channel",
    "dequantise_per_token",
    "quantise_per_channel",
    "quantise_per_token",
    "token_groups",
]

_AFFINE_LEVELS = 255
_SYMMETRIC_LIMIT = 127


def _scales(
    low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if symmetric:
        return symmetric_scale(low, high, _SYMMETRIC_LIMIT, dtype), None
    return affine_scale(low, high, _AFFINE_LEVELS, dtype)


def _codes(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    rounded = steps(x, scale, offset).round_()
    if offset is None:
        return rounded.clamp_(-_SYMMETRIC_LIMIT, _SYMMETRIC_LIMIT).to(torch.int8)
    return rounded.clamp_(0, _AFFINE_LEVELS).to(torch.uint8)


def quantise_per_channel(
    x: torch.Tensor,
    group_tokens: int = 0,
    *,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantised:
    """Quantise with one scale per (group of consecutive tokens, head, channel); meant for keys.

    Args:
        x: [T, H, d] floating point; T may be 0 or not a multiple of ``group_tokens`` (the last group is shorter).
        group_tokens: tokens per group; 0 means one group of all tokens.
        symmetric: no offset, int8 codes; otherwise the range [min, max] maps to 0..255.
        scale_dtype: dtype of ``scale`` and ``offset``.

    Returns:
        codes [T, H, d] and scale (and offset) [token_groups(T, group_tokens), H, d].

    Raises:
        ValueError: ``x`` is not a floating-point 3-D tensor, or ``group_tokens`` is negative.
    """
    check_input(x, group_tokens)
    tokens = x.shape[0]
    values = x.float()
    scale, offset = _scales(*channel_ranges(values, group_tokens), scale_dtype, symmetric=symmetric)
    spread_offset = None if offset is None else spread(offset, tokens, group_tokens)
    return Quantised(_codes(values, spread(scale, tokens, group_tokens), spread_offset), scale, offset)


def dequantise_per_channel(
    quantised: Quantised, group_tokens: int = 0, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Invert :func:`quantise_per_channel`; the error is at most half a step (plus rounding of ``scale_dtype``).

    Args:
        quantised: what :func:`quantise_per_channel` gave with the same ``group_tokens``.
        group_tokens: as given then.
        dtype: of the result.

    Returns:
        [T, H, d].

    Raises:
        ValueError: the number of groups does not fit the number of tokens.
    """
    check_groups(quantised, group_tokens)
    tokens = quantised.codes.shape[0]
    offset = None if quantised.offset is None else spread(quantised.offset, tokens, group_tokens)
    return restore(quantised.codes, spread(quantised.scale, tokens, group_tokens), offset, dtype)


def quantise_per_token(
    x: torch.Tensor, *, symmetric: bool = False, scale_dtype: torch.dtype = torch.float32
) -> Quantised:
    """Quantise with one scale per (token, head) over its channels; meant for values.

    Args:
        x: [T, H, d] floating point; T may be 0.
        symmetric: no offset, int8 codes; otherwise the range [min, max] maps to 0..255.
        scale_dtype: dtype of ``scale`` and ``offset``.

    Returns:
        codes [T, H, d] and scale (and offset) [T, H, 1].

    Raises:
        ValueError: ``x`` is not a floating-point 3-D tensor.
    """
    check_input(x)
    values = x.float()
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scale, offset = _scales(low, high, scale_dtype, symmetric=symmetric)
    return Quantised(_codes(values, scale, offset), scale, offset)


def dequantise_per_token(quantised: Quantised, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Invert :func:`quantise_per_token`: [T, H, d] in ``dtype``."""
    return restore(quantised.codes, quantised.scale, quantised.offset, dtype)
