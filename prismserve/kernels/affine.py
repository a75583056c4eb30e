"""What the integer formats share, in plain PyTorch: ranges, codes and their inverse for any number of levels.

Keys have outlier channels and are quantised per channel over groups of tokens; values are quantised per token over
the channels of one head (KIVI, arXiv:2402.02750, section 3.2). Arithmetic is float32; rounding is half to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Quantised:
    """Codes with what restores them: ``value = codes * scale + offset``.

    Attributes:
        codes: [T, H, d] uint8 (affine), int8 (symmetric) or float8_e4m3fn, contiguous; [T, H, d/2] uint8 for int4.
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


def check_input(x: torch.Tensor, group_tokens: int = 0) -> None:
    """ValueError unless ``x`` is floating point and 3-D and ``group_tokens`` is not negative."""
    if x.dim() != 3 or not x.is_floating_point():
        message = f"x must be a floating-point [T, H, d] tensor, got {x.dtype} {tuple(x.shape)}"
        raise ValueError(message)
    if group_tokens < 0:
        message = f"group_tokens must be at least 0, got {group_tokens}"
        raise ValueError(message)


def check_groups(quantised: Quantised, group_tokens: int) -> None:
    """ValueError unless there is a scale for every group of tokens."""
    tokens = quantised.codes.shape[0]
    groups = token_groups(tokens, group_tokens)
    if quantised.scale.shape[0] != groups:
        message = f"{tokens} tokens in groups of {group_tokens} need {groups} scales, got {quantised.scale.shape[0]}"
        raise ValueError(message)


def channel_ranges(values: torch.Tensor, group_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of every (group of tokens, head, channel) of [T, H, d]: two [G, H, d]."""
    tokens, heads, channels = values.shape
    size = group_tokens or max(tokens, 1)
    full = tokens // size * size
    lows = [values[:full].view(-1, size, heads, channels).amin(1)] if full else []
    highs = [values[:full].view(-1, size, heads, channels).amax(1)] if full else []
    if full < tokens:
        lows.append(values[full:].amin(0, keepdim=True))
        highs.append(values[full:].amax(0, keepdim=True))
    empty = values.new_zeros((0, heads, channels))
    low, high = (torch.cat(parts) if parts else empty for parts in (lows, highs))
    return low, high


def spread(per_group: torch.Tensor, tokens: int, group_tokens: int) -> torch.Tensor:
    """[G, H, d] to [T, H, d]: every token gets the row of its group."""
    if group_tokens == 0 or per_group.shape[0] == 1:
        return per_group.expand(tokens, -1, -1)
    return per_group.repeat_interleave(group_tokens, dim=0)[:tokens]


def affine_scale(
    low: torch.Tensor, high: torch.Tensor, levels: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset in the dtype they are kept in, so that codes are made with what will restore them."""
    return ((high - low) / levels).to(dtype), low.to(dtype)


def symmetric_scale(low: torch.Tensor, high: torch.Tensor, limit: float, dtype: torch.dtype) -> torch.Tensor:
    """The scale that maps the greatest magnitude to ``limit``."""
    return (torch.maximum(high.abs(), low.abs()) / limit).to(dtype)


def steps(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    """``(x - offset) / scale`` in float32, 0 where the scale is 0; not rounded."""
    scale32 = scale.float()
    divisor = torch.where(scale32 == 0, torch.ones_like(scale32), scale32)
    return (x if offset is None else x - offset.float()) / divisor


def restore(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """``codes * scale + offset``, computed in float32."""
    values = codes.float().mul_(scale.float())
    if offset is not None:
        values.add_(offset.float())
    return values.to(dtype)
