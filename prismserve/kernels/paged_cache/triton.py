"""One Triton kernel that rotates queries and keys, quantises where the cache is quantised, and writes the cache.

A program owns one (token, head). Writing alone is the same kernel without rotation and without queries; rotating alone
is the same kernel without keys.
"""

from __future__ import annotations

from typing import Final

import torch
import triton.language as tl

from prismserve.kernels.device import (
    FP8,
    INT4,
    INT8,
    PLAIN,
    fold_halves,
    kernel,
    power_of_two,
    range_scale,
    raw,
    store_rows,
    to_codes,
)
from prismserve.kernels.paged_cache.layout import KVFormat, LayerKV, QuantisedLayer, head_dim, storage

STORED: Final = {KVFormat.INT8: INT8, KVFormat.INT4: INT4, KVFormat.FP8: FP8}
"""The number a kernel knows a format by."""


def storage_format(layer: LayerKV) -> tl.constexpr:
    """PLAIN, INT8, INT4 or FP8."""
    return STORED[layer.format] if isinstance(layer, QuantisedLayer) else PLAIN


def scales(layer: LayerKV) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset [groups, 2, block_tokens, kv_heads]; any tensor stands in for what a layer does not have."""
    if not isinstance(layer, QuantisedLayer):
        return layer, layer
    return layer.scale, layer.scale if layer.offset is None else layer.offset


@kernel
def _turn(
    first: tl.tensor, second: tl.tensor, cos: tl.tensor, sin: tl.tensor, half: tl.tensor, live: tl.tensor
) -> tl.tensor:
    """Both halves of a head rotated, in float32; the angles' second half repeats the first."""
    cosine = tl.load(cos + half, mask=live, other=0.0)
    sine = tl.load(sin + half, mask=live, other=0.0)
    return first * cosine - second * sine, second * cosine + first * sine


@kernel
def _write_row(
    first: tl.tensor,
    second: tl.tensor,
    live: tl.tensor,
    base: tl.tensor,
    row: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    scale_row: tl.tensor,
    HALF: tl.constexpr,
    P: tl.constexpr,
    FORMAT: tl.constexpr,
) -> None:
    """Store one row, given as its two halves [P] float32, quantising it unless FORMAT is PLAIN."""
    everything = tl.full((1,), 1, tl.int1)
    upper, lower = first[None, :], second[None, :]
    rows = tl.zeros((1,), tl.int64) + row
    if FORMAT == PLAIN:
        store_rows(base, rows, upper, lower, live, everything, HALF, P, FORMAT)
    else:
        low, high = fold_halves(upper, lower, live[None, :], 1)
        exact, start = range_scale(low, high, FORMAT)
        exact, start = exact.to(scale.dtype.element_ty), start.to(scale.dtype.element_ty)
        places = tl.zeros((1,), tl.int64) + scale_row
        tl.store(scale + places, exact)
        if FORMAT == INT4:
            tl.store(offset + places, start)
        wide, begin = exact.to(tl.float32)[:, None], start.to(tl.float32)[:, None]
        codes_1, codes_2 = to_codes(upper, wide, begin, FORMAT), to_codes(lower, wide, begin, FORMAT)
        store_rows(base, rows, codes_1, codes_2, live, everything, HALF, P, FORMAT)


@kernel
def _write_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    key_offset: tl.tensor,
    value_offset: tl.tensor,
    slots: tl.tensor,
    heads: tl.tensor,
    stride_q: tl.tensor,
    stride_qh: tl.tensor,
    stride_k: tl.tensor,
    stride_kh: tl.tensor,
    stride_v: tl.tensor,
    stride_vh: tl.tensor,
    stride_group: tl.tensor,
    stride_slot: tl.tensor,
    stride_head: tl.tensor,
    stride_scale_group: tl.tensor,
    stride_scale_slot: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    P: tl.constexpr,
    FORMAT: tl.constexpr,
    ROTATE: tl.constexpr,
) -> None:
    """Heads 0..heads of the second grid axis are query heads; the rest are KV heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = tl.arange(0, P)
    live = half < HALF
    angles = token * (2 * HALF)
    if head < heads:
        source = q + token * stride_q + head * stride_qh + half
        first = tl.load(source, mask=live, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=live, other=0.0).to(tl.float32)
        first, second = _turn(first, second, cos + angles, sin + angles, half, live)
        target = out + (token * heads + head) * (2 * HALF) + half
        tl.store(target, first.to(out.dtype.element_ty), mask=live)
        tl.store(target + HALF, second.to(out.dtype.element_ty), mask=live)
    else:
        kv_head = head - heads
        slot = tl.load(slots + token)
        group, offset = slot // BLOCK_TOKENS, slot % BLOCK_TOKENS
        row = group * stride_group + offset * stride_slot + kv_head * stride_head
        scale_row = group * stride_scale_group + offset * stride_scale_slot + kv_head
        source = k + token * stride_k + kv_head * stride_kh + half
        first = tl.load(source, mask=live, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=live, other=0.0).to(tl.float32)
        if ROTATE:
            first, second = _turn(first, second, cos + angles, sin + angles, half, live)
            first = first.to(k.dtype.element_ty).to(tl.float32)
            second = second.to(k.dtype.element_ty).to(tl.float32)
        _write_row(first, second, live, keys, row, key_scale, key_offset, scale_row, HALF, P, FORMAT)
        source = v + token * stride_v + kv_head * stride_vh + half
        first = tl.load(source, mask=live, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=live, other=0.0).to(tl.float32)
        _write_row(first, second, live, values, row, value_scale, value_offset, scale_row, HALF, P, FORMAT)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate_and_write(
    qkv: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    layer: LayerKV,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Write keys and values; with angles, rotate the keys and the queries first.

    Args:
        qkv: q [T, H, d] or None, k and v [T, kv_heads, d].
        angles: cos and sin, each [T, d] float32; None writes keys as they are.
        layer: written in place.
        slots: [T] int64, distinct.

    Returns:
        The rotated queries [T, H, d]; an empty tensor if there are none.
    """
    q, k, v = qkv
    tokens, kv_heads, channels = k.shape
    queries = k[:, :0] if q is None else _rows(q)
    k, v = _rows(k), _rows(v)
    heads = queries.shape[1]
    out = torch.empty((tokens, heads, channels), device=k.device, dtype=k.dtype)
    if tokens == 0:
        return out
    cos, sin = (k, k) if angles is None else (angles[0].contiguous(), angles[1].contiguous())
    codes, (scale, offset) = raw(storage(layer)), scales(layer)
    half = head_dim(layer) // 2
    _write_kernel[(tokens, heads + kv_heads)](
        queries,
        k,
        v,
        cos,
        sin,
        out,
        codes[:, 0],
        codes[:, 1],
        scale[:, 0],
        scale[:, 1],
        offset[:, 0],
        offset[:, 1],
        slots,
        heads,
        queries.stride(0),
        queries.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        codes.stride(0),
        codes.stride(2),
        codes.stride(3),
        scale.stride(0),
        scale.stride(2),
        BLOCK_TOKENS=codes.shape[2],
        HALF=half,
        P=power_of_two(half),
        FORMAT=storage_format(layer),
        ROTATE=angles is not None,
        num_warps=1,
    )
    return out


def write_kv(layer: LayerKV, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """See the reference."""
    rotate_and_write((None, keys, values), None, layer, slots)
