"""8-bit quantisation in plain PyTorch.

Keys have outlier channels and are quantised per channel over groups of tokens; values are quantised per token over
the channels of one head (KIVI, arXiv:2402.02750, section 3.2). Arithmetic is float32; rounding is half to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_AFFINE_LEVELS = 255
_SYMMETRIC_LIMIT = 127


@dataclass(frozen=True, slots=True)
class Quantised:
    """Codes with what restores them: ``value = codes * scale + offset``.

    Attributes:
        codes: [T, H, d] uint8 (affine, 0..255) or int8 (symmetric, -127..127), contiguous.
        scale: [G, H, d] per channel with G groups of tokens, [T, H, 1] per token.
        offset: the value of code 0, shaped as ``scale``; None if symmetric.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None


def token_groups(tokens: int, group_tokens: int) -> int:
    """Groups that ``tokens`` fall into; the last may be shorter. ``group_tokens`` 0 means one group of all."""
    if tokens == 0:
        return 0
    return 1 if group_tokens == 0 else -(-tokens // group_tokens)


def _check(x: torch.Tensor, group_tokens: int = 0) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        message = f"x must be a floating-point [T, H, d] tensor, got {x.dtype} {tuple(x.shape)}"
        raise ValueError(message)
    if group_tokens < 0:
        message = f"group_tokens must be at least 0, got {group_tokens}"
        raise ValueError(message)


def _scales(
    low: torch.Tensor, high: torch.Tensor, scale_dtype: torch.dtype, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and offset in the dtype they are kept in, so that codes are made with what will restore them."""
    if symmetric:
        return (torch.maximum(high.abs(), low.abs()) / _SYMMETRIC_LIMIT).to(scale_dtype), None
    return ((high - low) / _AFFINE_LEVELS).to(scale_dtype), low.to(scale_dtype)


def _codes(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    scale32 = scale.float()
    divisor = torch.where(scale32 == 0, torch.ones_like(scale32), scale32)
    if offset is None:
        return (x / divisor).round_().clamp_(-_SYMMETRIC_LIMIT, _SYMMETRIC_LIMIT).to(torch.int8)
    return ((x - offset.float()) / divisor).round_().clamp_(0, _AFFINE_LEVELS).to(torch.uint8)


def _restore(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    values = codes.float().mul_(scale.float())
    if offset is not None:
        values.add_(offset.float())
    return values.to(dtype)


def _spread(per_group: torch.Tensor, tokens: int, group_tokens: int) -> torch.Tensor:
    """[G, H, d] to [T, H, d]: every token gets the row of its group."""
    if group_tokens == 0 or per_group.shape[0] == 1:
        return per_group.expand(tokens, -1, -1)
    return per_group.repeat_interleave(group_tokens, dim=0)[:tokens]


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
    _check(x, group_tokens)
    tokens, heads, channels = x.shape
    values = x.float()
    size = group_tokens or max(tokens, 1)
    full = tokens // size * size
    lows = [values[:full].view(-1, size, heads, channels).amin(1)] if full else []
    highs = [values[:full].view(-1, size, heads, channels).amax(1)] if full else []
    if full < tokens:
        lows.append(values[full:].amin(0, keepdim=True))
        highs.append(values[full:].amax(0, keepdim=True))
    empty = values.new_zeros((0, heads, channels))
    low, high = (torch.cat(parts) if parts else empty for parts in (lows, highs))
    scale, offset = _scales(low, high, scale_dtype, symmetric=symmetric)
    spread_offset = None if offset is None else _spread(offset, tokens, group_tokens)
    return Quantised(_codes(values, _spread(scale, tokens, group_tokens), spread_offset), scale, offset)


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
    tokens = quantised.codes.shape[0]
    groups = token_groups(tokens, group_tokens)
    if quantised.scale.shape[0] != groups:
        message = f"{tokens} tokens in groups of {group_tokens} need {groups} scales, got {quantised.scale.shape[0]}"
        raise ValueError(message)
    offset = None if quantised.offset is None else _spread(quantised.offset, tokens, group_tokens)
    return _restore(quantised.codes, _spread(quantised.scale, tokens, group_tokens), offset, dtype)


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
    _check(x)
    values = x.float()
    scale, offset = _scales(
        values.amin(-1, keepdim=True), values.amax(-1, keepdim=True), scale_dtype, symmetric=symmetric
    )
    return Quantised(_codes(values, scale, offset), scale, offset)


def dequantise_per_token(quantised: Quantised, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Invert :func:`quantise_per_token`: [T, H, d] in ``dtype``."""
    return _restore(quantised.codes, quantised.scale, quantised.offset, dtype)
