"""Triton kernels behind the int8, int4 and fp8 ops: one program per tile of rows, or per group of a head's channels."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from prismserve.kernels.affine import Quantised, check_groups, check_input, token_groups
from prismserve.kernels.device import (
    AFFINE8,
    FP8,
    INT4,
    INT8,
    PLAIN,
    fold_halves,
    kernel,
    load_rows,
    power_of_two,
    range_scale,
    raw,
    store_rows,
    to_codes,
)

_ROWS: Final = 32
_CODES: Final = {
    int(INT8.value): torch.int8,
    int(INT4.value): torch.uint8,
    int(FP8.value): torch.float8_e4m3fn,
    int(AFFINE8.value): torch.uint8,
}


@kernel
def _rows_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
) -> None:
    """Quantise ROWS rows (token, head) of D contiguous channels."""
    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = HALF if FORMAT == INT4 else D
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    lane = tl.arange(0, P)
    live = lane < HALF
    mask = keep[:, None] & live[None, :]
    source = x + ((row // heads) * stride_t + (row % heads) * stride_h)[:, None] + lane[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    low, high = fold_halves(first, second, live[None, :], 1)
    exact, base = range_scale(low, high, FORMAT)
    # What is stored is what codes are made with.
    exact = exact.to(scale.dtype.element_ty)
    base = base.to(scale.dtype.element_ty)
    tl.store(scale + row, exact, mask=keep)
    if FORMAT == INT4 or FORMAT == AFFINE8:
        tl.store(offset + row, base, mask=keep)
    wide, start = exact.to(tl.float32)[:, None], base.to(tl.float32)[:, None]
    store_rows(
        codes,
        row * WIDTH,
        to_codes(first, wide, start, FORMAT),
        to_codes(second, wide, start, FORMAT),
        live,
        keep,
        HALF,
        P,
        FORMAT,
    )


@kernel
def _channels_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    group_tokens: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
) -> None:
    """Quantise one group of tokens of one head, a range per channel: one pass for the ranges, one for the codes."""
    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = HALF if FORMAT == INT4 else D
    group, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start = group * group_tokens
    end = tl.minimum(start + group_tokens, tokens)
    lane, row = tl.arange(0, P), tl.arange(0, ROWS)
    live = lane < HALF
    low_1 = tl.full((P,), float("inf"), tl.float32)
    low_2 = tl.full((P,), float("inf"), tl.float32)
    high_1 = tl.full((P,), -float("inf"), tl.float32)
    high_2 = tl.full((P,), -float("inf"), tl.float32)
    for at in range(start, end, ROWS):
        token = at + row
        mask = (token < end)[:, None] & live[None, :]
        source = x + (token * stride_t + head * stride_h)[:, None] + lane[None, :]
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        low, high = fold_halves(first, first, mask, 0)
        low_1, high_1 = tl.minimum(low_1, low), tl.maximum(high_1, high)
        low, high = fold_halves(second, second, mask, 0)
        low_2, high_2 = tl.minimum(low_2, low), tl.maximum(high_2, high)
    at_scale = (group * heads + head) * D + lane
    scale_1, offset_1 = range_scale(tl.where(live, low_1, 0.0), tl.where(live, high_1, 0.0), FORMAT)
    scale_2, offset_2 = range_scale(tl.where(live, low_2, 0.0), tl.where(live, high_2, 0.0), FORMAT)
    scale_1, offset_1 = scale_1.to(scale.dtype.element_ty), offset_1.to(scale.dtype.element_ty)
    scale_2, offset_2 = scale_2.to(scale.dtype.element_ty), offset_2.to(scale.dtype.element_ty)
    tl.store(scale + at_scale, scale_1, mask=live)
    tl.store(scale + at_scale + HALF, scale_2, mask=live)
    if FORMAT == INT4 or FORMAT == AFFINE8:
        tl.store(offset + at_scale, offset_1, mask=live)
        tl.store(offset + at_scale + HALF, offset_2, mask=live)
    for at in range(start, end, ROWS):
        token = at + row
        keep = token < end
        mask = keep[:, None] & live[None, :]
        source = x + (token * stride_t + head * stride_h)[:, None] + lane[None, :]
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        code_1 = to_codes(first, scale_1.to(tl.float32)[None, :], offset_1.to(tl.float32)[None, :], FORMAT)
        code_2 = to_codes(second, scale_2.to(tl.float32)[None, :], offset_2.to(tl.float32)[None, :], FORMAT)
        store_rows(codes, (token * heads + head) * WIDTH, code_1, code_2, live, keep, HALF, P, FORMAT)


@kernel
def _restore_kernel(
    codes: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    group_tokens: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    AFFINE: tl.constexpr,
) -> None:
    """``codes * scale + offset`` of ROWS rows (token, head)."""
    WIDTH: tl.constexpr = D // 2 if FORMAT == INT4 else D
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    lane = tl.arange(0, P)
    mask = keep[:, None] & (lane < D)[None, :]
    values = load_rows(codes, row * WIDTH, keep, D, P, FORMAT, tl.float32)
    if PER_CHANNEL:
        at = ((row // heads // group_tokens) * heads + row % heads)[:, None] * D + lane[None, :]
        values = values * tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
        if AFFINE:
            values += tl.load(offset + at, mask=mask, other=0.0).to(tl.float32)
    else:
        values = values * tl.load(scale + row, mask=keep, other=0.0).to(tl.float32)[:, None]
        if AFFINE:
            values += tl.load(offset + row, mask=keep, other=0.0).to(tl.float32)[:, None]
    tl.store(out + row[:, None] * D + lane[None, :], values.to(out.dtype.element_ty), mask=mask)


def _prepare(x: torch.Tensor, storage: tl.constexpr, group_tokens: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` with contiguous channels, and room for its codes."""
    check_input(x, group_tokens)
    tokens, heads, channels = x.shape
    if channels % 2:
        message = f"these kernels work on halves of a head and need an even number of channels, got {channels}"
        raise ValueError(message)
    width = channels // 2 if storage is INT4 else channels
    codes = torch.empty((tokens, heads, width), device=x.device, dtype=_CODES[int(storage.value)])
    return x if x.stride(-1) == 1 else x.contiguous(), codes


def quantise_rows(x: torch.Tensor, storage: tl.constexpr, scale_dtype: torch.dtype) -> Quantised:
    """One range per (token, head) of [T, H, d]; ``storage`` is INT8, INT4, FP8 or AFFINE8.

    Raises:
        ValueError: ``x`` is not a floating-point 3-D tensor of even d.
    """
    x, codes = _prepare(x, storage)
    tokens, heads, channels = x.shape
    scale = torch.empty((tokens, heads, 1), device=x.device, dtype=scale_dtype)
    offset = torch.empty_like(scale) if storage in {INT4, AFFINE8} else None
    if tokens * heads:
        _rows_kernel[(triton.cdiv(tokens * heads, _ROWS),)](
            x,
            raw(codes),
            scale,
            scale if offset is None else offset,
            tokens * heads,
            heads,
            x.stride(0),
            x.stride(1),
            D=channels,
            P=power_of_two(channels // 2),
            ROWS=_ROWS,
            FORMAT=storage,
        )
    return Quantised(codes, scale, offset)


def quantise_channels(x: torch.Tensor, group_tokens: int, storage: tl.constexpr, scale_dtype: torch.dtype) -> Quantised:
    """One range per (group of tokens, head, channel) of [T, H, d]; ``storage`` is INT8, INT4 or AFFINE8.

    Raises:
        ValueError: ``x`` is not a floating-point 3-D tensor of even d, or ``group_tokens`` is negative.
    """
    x, codes = _prepare(x, storage, group_tokens)
    tokens, heads, channels = x.shape
    groups = token_groups(tokens, group_tokens)
    scale = torch.empty((groups, heads, channels), device=x.device, dtype=scale_dtype)
    offset = torch.empty_like(scale) if storage in {INT4, AFFINE8} else None
    if groups * heads:
        _channels_kernel[(groups, heads)](
            x,
            codes,
            scale,
            scale if offset is None else offset,
            tokens,
            heads,
            group_tokens or tokens,
            x.stride(0),
            x.stride(1),
            D=channels,
            P=power_of_two(channels // 2),
            ROWS=_ROWS,
            FORMAT=storage,
        )
    return Quantised(codes, scale, offset)


def dequantise(
    quantised: Quantised, dtype: torch.dtype, storage: tl.constexpr, group_tokens: int | None = None
) -> torch.Tensor:
    """[T, H, d] in ``dtype``; ``group_tokens`` as given when quantising per channel, None for per token.

    Raises:
        ValueError: the number of groups does not fit the number of tokens.
    """
    if group_tokens is not None:
        check_groups(quantised, group_tokens)
    codes = quantised.codes.contiguous()
    tokens, heads, width = codes.shape
    channels = 2 * width if storage is INT4 else width
    out = torch.empty((tokens, heads, channels), device=codes.device, dtype=dtype)
    scale = quantised.scale.contiguous()
    offset = scale if quantised.offset is None else quantised.offset.contiguous()
    if tokens * heads:
        _restore_kernel[(triton.cdiv(tokens * heads, _ROWS),)](
            raw(codes),
            scale,
            offset,
            out,
            tokens * heads,
            heads,
            group_tokens or tokens,
            D=channels,
            P=power_of_two(channels),
            ROWS=_ROWS,
            FORMAT=storage,
            PER_CHANNEL=group_tokens is not None,
            AFFINE=quantised.offset is not None,
        )
    return out


__all__ = ["AFFINE8", "FP8", "INT4", "INT8", "PLAIN", "dequantise", "quantise_channels", "quantise_rows"]
