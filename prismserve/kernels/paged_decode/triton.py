"""Split-KV decode attention in Triton: parts of a long sequence are attended side by side and merged by log-sum-exp.

Source: Flash-Decoding (Dao et al., 2023). The cut is made on the device from each sequence's length, so the launch
depends on shapes alone and can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import triton.language as tl

from prismserve.kernels.attention_tile import finish_tile, fold_tile, score_tile, slot_places
from prismserve.kernels.device import kernel, power_of_two, raw
from prismserve.kernels.paged_cache.layout import LayerKV, storage
from prismserve.kernels.paged_cache.triton import scales, storage_format

_LOG2_E: Final = 1.4426950408889634
_SPLITS_MAX: Final = 64
_SPLIT_TOKENS_MIN: Final = 512
"""A shorter part does not pay for its merging."""
_PROGRAMS_PER_PROCESSOR: Final = 4


@kernel
def _decode_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    key_offset: tl.tensor,
    value_offset: tl.tensor,
    tables: tl.tensor,
    kv_lens: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    scale_log2: tl.tensor,
    stride_q: tl.tensor,
    stride_qh: tl.tensor,
    stride_group: tl.tensor,
    stride_slot: tl.tensor,
    stride_head: tl.tensor,
    stride_scale_group: tl.tensor,
    stride_scale_slot: tl.tensor,
    stride_table: tl.tensor,
    HEADS: tl.constexpr,
    REP: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    FORMAT: tl.constexpr,
) -> None:
    """One part of one sequence for the REP query heads of one KV head; out and lse are [B, HEADS, SPLITS, ...]."""
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(kv_lens + sequence)
    tiles = (length + N - 1) // N
    per_split = (tiles + SPLITS - 1) // SPLITS * N
    start = split * per_split
    end = tl.minimum(start + per_split, length)
    m, lane = tl.arange(0, M), tl.arange(0, P)
    head = kv_head * REP + m
    live = (m < REP)[:, None] & (lane < D)[None, :]
    rows_q = tl.load(q + sequence * stride_q + head[:, None] * stride_qh + lane[None, :], mask=live, other=0.0)
    q_sum = tl.sum(rows_q.to(tl.float32), 1)
    state = (
        tl.full((M,), -float("inf"), tl.float32),
        tl.zeros((M,), tl.float32),
        tl.zeros((M, P), tl.float32),
        tl.zeros((M,), tl.float32),
    )
    strides, scale_strides = (stride_group, stride_slot, stride_head), (stride_scale_group, stride_scale_slot)
    table = tables + sequence * stride_table
    for first in range(start, end, N):
        slot = first + tl.arange(0, N)
        inside = slot < end
        rows, scale_rows = slot_places(table, slot, inside, kv_head, strides, scale_strides, BLOCK_TOKENS)
        scores = score_tile(rows_q, q_sum, keys, key_scale, key_offset, rows, scale_rows, inside, D, P, FORMAT)
        scores = tl.where(inside[None, :], scores * scale_log2, -float("inf"))
        state = fold_tile(
            scores, state, values, value_scale, value_offset, rows, scale_rows, inside, D, P, FORMAT, rows_q.dtype
        )
    result, log_sum = finish_tile(state)
    at = (sequence * HEADS + head) * SPLITS + split
    tl.store(out + at[:, None] * D + lane[None, :], result.to(out.dtype.element_ty), mask=live)
    tl.store(lse + at, log_sum, mask=m < REP)


@kernel
def _merge_kernel(
    parts: tl.tensor,
    part_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Merge the parts of one (sequence, head); SPLITS is a power of two."""
    row = tl.program_id(0).to(tl.int64)
    split, lane = tl.arange(0, SPLITS), tl.arange(0, P)
    sums = tl.load(part_lse + row * SPLITS + split)
    most = tl.max(sums, 0)
    safe = tl.where(most == -float("inf"), 0.0, most)
    weights = tl.exp(sums - safe)
    total = tl.sum(weights, 0)
    live = (lane < D)[None, :] & (split >= 0)[:, None]
    part = tl.load(parts + (row * SPLITS + split)[:, None] * D + lane[None, :], mask=live, other=0.0)
    divisor = tl.where(total > 0, total, 1.0)
    merged = tl.sum(part * weights[:, None], 0) / divisor
    tl.store(out + row * D + lane, merged.to(out.dtype.element_ty), mask=lane < D)
    tl.store(lse + row, tl.where(total > 0, safe + tl.log(divisor), -float("inf")))


@cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_splits(programs: int, slots: int, processors: int) -> int:
    """Parts per sequence: enough programs to fill the device, none of them too short; a power of two.

    Args:
        programs: sequences times KV heads.
        slots: cache slots of the longest table.
        processors: of the device.
    """
    wanted = -(-_PROGRAMS_PER_PROCESSOR * processors // max(programs, 1))
    possible = max(1, slots // _SPLIT_TOKENS_MIN)
    return power_of_two(min(wanted, possible, _SPLITS_MAX))


def paged_decode(
    q: torch.Tensor,
    layer: LayerKV,
    tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    *,
    with_lse: bool = False,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See the reference.

    Args:
        q: [B, H, d].
        layer: plain or quantised.
        tables: [B, W] int32 or int64; entries behind a sequence's last block are never read.
        kv_lens: [B] int32 or int64.
        scale: of the scores.
        with_lse: also return the log-sum-exp.
        splits: parts per sequence, a power of two; None chooses by :func:`choose_splits`.

    Returns:
        [B, H, d] and [B, H] float32 or None.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    sequences, heads, channels = q.shape
    codes, (scale_rows, offset_rows) = storage(layer), scales(layer)
    codes = raw(codes)
    block_tokens, kv_heads = codes.shape[2:4]
    if splits is None:
        splits = choose_splits(sequences * kv_heads, tables.shape[1] * block_tokens, _processors(q.device))
    out = torch.empty((sequences, heads, channels), device=q.device, dtype=q.dtype)
    lse = torch.empty((sequences, heads), device=q.device, dtype=torch.float32)
    if sequences == 0:
        return out, lse if with_lse else None
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty((sequences, heads, splits, channels), device=q.device, dtype=torch.float32)
        part_lse = torch.empty((sequences, heads, splits), device=q.device, dtype=torch.float32)
    padded = power_of_two(channels, 16)
    _decode_kernel[(sequences, kv_heads, splits)](
        q,
        codes[:, 0],
        codes[:, 1],
        scale_rows[:, 0],
        scale_rows[:, 1],
        offset_rows[:, 0],
        offset_rows[:, 1],
        tables,
        kv_lens,
        parts,
        part_lse,
        scale * _LOG2_E,
        q.stride(0),
        q.stride(1),
        codes.stride(0),
        codes.stride(2),
        codes.stride(3),
        scale_rows.stride(0),
        scale_rows.stride(2),
        tables.stride(0),
        HEADS=heads,
        REP=heads // kv_heads,
        D=channels,
        P=padded,
        BLOCK_TOKENS=block_tokens,
        M=power_of_two(heads // kv_heads, 16),
        N=64 if padded <= 128 else 32,
        SPLITS=splits,
        FORMAT=storage_format(layer),
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _merge_kernel[(sequences * heads,)](parts, part_lse, out, lse, D=channels, P=padded, SPLITS=splits, num_warps=2)
    return out, lse if with_lse else None
