"""What the Triton kernels share: the decorator, launch arithmetic, rounding, and the storage formats of a KV cache.

Formats are numbered because a kernel takes them as compile-time constants. Two things are done by hand so that they
work on every GPU and in the interpreter alike: rounding half to even, and the conversion of e4m3 (whose instructions
need compute capability 8.9).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import triton
import triton.language as tl

PLAIN: Final = tl.constexpr(0)
INT8: Final = tl.constexpr(1)
INT4: Final = tl.constexpr(2)
FP8: Final = tl.constexpr(3)
AFFINE8: Final = tl.constexpr(4)

_ROUND: Final = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 has no fraction bits left at this size


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` with a type that strict checkers accept."""
    return triton.jit(function)


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``value`` and ``least``."""
    return max(least, 1 << max(0, value - 1).bit_length())


def raw(codes: torch.Tensor) -> torch.Tensor:
    """A view that a kernel can address: e4m3 as bytes, everything else as it is."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


@kernel
def round_even(x: tl.tensor) -> tl.tensor:
    """Nearest integer of a float32 below 2^22, ties to even."""
    return (x + _ROUND) - _ROUND


@kernel
def decode_e4m3(byte: tl.tensor) -> tl.tensor:
    """The float16 value of e4m3 bytes (no NaN among them): the same bits under float16's bias, times 2^8."""
    bits = byte.to(tl.uint16)
    moved = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return moved.to(tl.float16, bitcast=True) * 256.0


@kernel
def encode_e4m3(x: tl.tensor) -> tl.tensor:
    """The e4m3 byte nearest to a float32, ties to even, saturating at 448 (arXiv:2209.05433)."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # Keep 3 of 23 fraction bits, rounding to even, and move the exponent from bias 127 to bias 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = round_even(size * 512.0).to(tl.int32)
    code = tl.where(size < 0.015625, subnormal, normal)
    return tl.where(x < 0, code | 0x80, code).to(tl.uint8)


@kernel
def fold_halves(first: tl.tensor, second: tl.tensor, live: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """Least and greatest value of each row (AXIS 1) over both halves of its channels.

    Args:
        first: [R, P] float32 values of channels 0..d/2.
        second: [R, P] float32 values of channels d/2..d.
        live: bool that broadcasts to [R, P], what exists.
        AXIS: the axis to reduce.

    Returns:
        Two [R].
    """
    low = tl.minimum(tl.where(live, first, float("inf")), tl.where(live, second, float("inf")))
    high = tl.maximum(tl.where(live, first, -float("inf")), tl.where(live, second, -float("inf")))
    return tl.min(low, AXIS), tl.max(high, AXIS)


@kernel
def range_scale(low: tl.tensor, high: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Scale and offset (0 for symmetric formats) that map a range to the codes of a format; float32."""
    zero = low * 0.0
    size = tl.maximum(tl.abs(low), tl.abs(high))
    if FORMAT == INT4:
        scale, offset = tl.div_rn(high - low, zero + 15.0), low
    elif FORMAT == AFFINE8:
        scale, offset = tl.div_rn(high - low, zero + 255.0), low
    elif FORMAT == INT8:
        scale, offset = tl.div_rn(size, zero + 127.0), zero
    else:
        scale, offset = tl.div_rn(size, zero + 448.0), zero
    return scale, offset


@kernel
def to_codes(x: tl.tensor, scale: tl.tensor, offset: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Codes of float32 values with the scale and offset (broadcastable to ``x``) that will restore them."""
    divisor = tl.where(scale == 0, 1.0, scale) + tl.zeros_like(x)
    # A compile-time choice has one exit: what follows a return would be compiled too.
    if FORMAT == FP8:
        codes = encode_e4m3(tl.div_rn(x, divisor))
    elif FORMAT == INT8:
        codes = round_even(tl.minimum(tl.maximum(tl.div_rn(x, divisor), -127.0), 127.0)).to(tl.int8)
    elif FORMAT == INT4:
        codes = round_even(tl.minimum(tl.maximum(tl.div_rn(x - offset, divisor), 0.0), 15.0)).to(tl.uint8)
    else:
        codes = round_even(tl.minimum(tl.maximum(tl.div_rn(x - offset, divisor), 0.0), 255.0)).to(tl.uint8)
    return codes


@kernel
def store_rows(
    base: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    live: tl.tensor,
    keep: tl.tensor,
    HALF: tl.constexpr,
    P: tl.constexpr,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """Write codes (or plain values) of both halves of rows of channels; INT4 shares a byte between the halves.

    Args:
        base: pointer.
        rows: [R] int64 element offset of each row.
        first: [R, P] codes of channels 0..HALF.
        second: [R, P] codes of channels HALF..2*HALF.
        live: [P] bool.
        keep: [R] bool, which rows to write.
        HALF: half the channels.
        P: HALF padded to a power of two.
        FORMAT: any.
    """
    lane = tl.arange(0, P)
    at = base + rows[:, None] + lane[None, :]
    mask = keep[:, None] & live[None, :]
    if FORMAT == INT4:
        tl.store(at, first | (second << 4), mask=mask)
    else:
        tl.store(at, first.to(base.dtype.element_ty), mask=mask)
        tl.store(at + HALF, second.to(base.dtype.element_ty), mask=mask)


@kernel
def load_rows(
    base: tl.tensor,
    rows: tl.tensor,
    keep: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT: tl.constexpr,
) -> tl.tensor:
    """Codes (or plain values) of rows of channels as numbers of type ``OUT``, not scaled yet.

    Args:
        base: pointer.
        rows: [N] int64 element offset of each row.
        keep: [N] bool; other rows read as zero.
        D: channels.
        P: D padded to a power of two.
        FORMAT: any.
        OUT: element type of the result, at least as wide as the codes.

    Returns:
        [N, P], zero where a channel does not exist.
    """
    lane = tl.arange(0, P)
    mask = keep[:, None] & (lane < D)[None, :]
    if FORMAT == INT4:
        # Both nibbles of a byte are read from one address; the second read is a cache hit.
        byte = tl.load(base + rows[:, None] + (lane % (D // 2))[None, :], mask=mask, other=0)
        numbers = ((byte.to(tl.int32) >> tl.where(lane < D // 2, 0, 4)[None, :]) & 15).to(tl.float32)
    else:
        codes = tl.load(base + rows[:, None] + lane[None, :], mask=mask, other=0)
        if FORMAT == FP8:
            numbers = decode_e4m3(codes)
        elif FORMAT == PLAIN:
            numbers = codes
        else:
            numbers = codes.to(tl.float32)
    return numbers.to(OUT)
