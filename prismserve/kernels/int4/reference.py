"""4-bit quantisation in plain PyTorch, two codes to a byte.

Byte j of a row of d channels holds channel j in its low and channel j + d/2 in its high nibble: a kernel that works on
halves of a head (as rotary embedding does) packs and unpacks without moving lanes. Ranges are affine, [min, max] to
0..15; keys per channel, values per token (KIVI, arXiv:2402.02750, section 3.2).
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
)

_LEVELS = 15


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 as uint8 [..., d] to bytes [..., d/2].

    Raises:
        ValueError: d is odd.
    """
    if codes.shape[-1] % 2:
        message = f"int4 packs two channels to a byte and needs an even number of them, got {codes.shape[-1]}"
        raise ValueError(message)
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Invert :func:`pack`: uint8 [..., d/2] to codes 0..15 as uint8 [..., d]."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _codes(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return pack(steps(x, scale, offset).round_().clamp_(0, _LEVELS).to(torch.uint8))


def quantise_per_channel(
    x: torch.Tensor, group_tokens: int = 0, *, scale_dtype: torch.dtype = torch.float32
) -> Quantised:
    """Quantise with one range per (group of consecutive tokens, head, channel); meant for keys.

    Args:
        x: [T, H, d] floating point, d even; T may be 0 or not a multiple of ``group_tokens``.
        group_tokens: tokens per group; 0 means one group of all tokens.
        scale_dtype: dtype of ``scale`` and ``offset``.

    Returns:
        codes [T, H, d/2] uint8 and scale and offset [token_groups(T, group_tokens), H, d].

    Raises:
        ValueError: ``x`` is not a floating-point 3-D tensor of even d, or ``group_tokens`` is negative.
    """
    check_input(x, group_tokens)
    tokens = x.shape[0]
    values = x.float()
    scale, offset = affine_scale(*channel_ranges(values, group_tokens), _LEVELS, scale_dtype)
    codes = _codes(values, spread(scale, tokens, group_tokens), spread(offset, tokens, group_tokens))
    return Quantised(codes, scale, offset)


def dequantise_per_channel(
    quantised: Quantised, group_tokens: int = 0, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Invert :func:`quantise_per_channel`: [T, H, d] in ``dtype``; the error is at most half a step.

    Raises:
        ValueError: the number of groups does not fit the number of tokens.
    """
    check_groups(quantised, group_tokens)
    tokens = quantised.codes.shape[0]
    offset = None if quantised.offset is None else spread(quantised.offset, tokens, group_tokens)
    return restore(unpack(quantised.codes), spread(quantised.scale, tokens, group_tokens), offset, dtype)


def quantise_per_token(x: torch.Tensor, *, scale_dtype: torch.dtype = torch.float32) -> Quantised:
    """Quantise with one range per (token, head) over its channels; meant for values and for resident caches.

    Args:
        x: [T, H, d] floating point, d even; T may be 0.
        scale_dtype: dtype of ``scale`` and ``offset``.

    Returns:
        codes [T, H, d/2] uint8 and scale and offset [T, H, 1].

    Raises:
        ValueError: ``x`` is not a floating-point 3-D tensor of even d.
    """
    check_input(x)
    values = x.float()
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scale, offset = affine_scale(low, high, _LEVELS, scale_dtype)
    return Quantised(_codes(values, scale, offset), scale, offset)


def dequantise_per_token(quantised: Quantised, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Invert :func:`quantise_per_token`: [T, H, d] in ``dtype``."""
    return restore(unpack(quantised.codes), quantised.scale, quantised.offset, dtype)
