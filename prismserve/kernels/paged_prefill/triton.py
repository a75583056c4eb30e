"""Varlen causal attention over a paged cache in Triton (FlashAttention-2's loop order, arXiv:2307.08691).

A tile of rows is rows of queries times the query heads of one KV head, so keys and values are read once for all of
them. Slots that every row of the tile sees are attended without a mask.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from prismserve.kernels.attention_tile import finish_tile, fold_tile, score_tile, slot_places
from prismserve.kernels.device import kernel, power_of_two, raw
from prismserve.kernels.paged_cache.layout import LayerKV, storage
from prismserve.kernels.paged_cache.triton import scales, storage_format
from prismserve.kernels.paged_prefill.plan import Ragged

_LOG2_E: Final = 1.4426950408889634


@kernel
def _prefill_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    key_offset: tl.tensor,
    value_offset: tl.tensor,
    tables: tl.tensor,
    q_starts: tl.tensor,
    q_lens: tl.tensor,
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
    FORMAT: tl.constexpr,
    WITH_LSE: tl.constexpr,
) -> None:
    """One tile of M (row, head) pairs of one sequence and KV head."""
    kv_head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries, cached = tl.load(q_lens + sequence), tl.load(kv_lens + sequence)
    # The last tiles see the most slots; they start first so that none of them is left for the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if tile * M >= queries * REP:
        return
    pair, lane = tile * M + tl.arange(0, M), tl.arange(0, P)
    exists = pair < queries * REP
    row = tl.minimum(pair // REP, queries - 1)
    head = kv_head * REP + pair % REP
    position = cached - queries + row
    at = (tl.load(q_starts + sequence) + row).to(tl.int64)
    live = exists[:, None] & (lane < D)[None, :]
    rows_q = tl.load(q + (at * stride_q + head * stride_qh)[:, None] + lane[None, :], mask=live, other=0.0)
    q_sum = tl.sum(rows_q.to(tl.float32), 1)
    state = (
        tl.full((M,), -float("inf"), tl.float32),
        tl.zeros((M,), tl.float32),
        tl.zeros((M, P), tl.float32),
        tl.zeros((M,), tl.float32),
    )
    strides, scale_strides = (stride_group, stride_slot, stride_head), (stride_scale_group, stride_scale_slot)
    table = tables + sequence * stride_table
    end = tl.max(position, 0) + 1
    seen_by_all = (tl.min(position, 0) + 1) // N * N
    for first in range(0, seen_by_all, N):
        slot = first + tl.arange(0, N)
        inside = slot >= 0
        rows, scale_rows = slot_places(table, slot, inside, kv_head, strides, scale_strides, BLOCK_TOKENS)
        scores = score_tile(rows_q, q_sum, keys, key_scale, key_offset, rows, scale_rows, inside, D, P, FORMAT)
        state = fold_tile(
            scores * scale_log2,
            state,
            values,
            value_scale,
            value_offset,
            rows,
            scale_rows,
            inside,
            D,
            P,
            FORMAT,
            rows_q.dtype,
        )
    for first in range(seen_by_all, end, N):
        slot = first + tl.arange(0, N)
        inside = slot < end
        rows, scale_rows = slot_places(table, slot, inside, kv_head, strides, scale_strides, BLOCK_TOKENS)
        scores = score_tile(rows_q, q_sum, keys, key_scale, key_offset, rows, scale_rows, inside, D, P, FORMAT)
        scores = tl.where(slot[None, :] <= position[:, None], scores * scale_log2, -float("inf"))
        state = fold_tile(
            scores, state, values, value_scale, value_offset, rows, scale_rows, inside, D, P, FORMAT, rows_q.dtype
        )
    result, log_sum = finish_tile(state)
    target = at * HEADS + head
    tl.store(out + target[:, None] * D + lane[None, :], result.to(out.dtype.element_ty), mask=live)
    if WITH_LSE:
        tl.store(lse + target, log_sum, mask=exists)


def _tile(padded: int, element_bytes: int, pairs: int, *, plain: bool) -> tuple[int, int, int]:
    """Rows and slots of a tile, and warps; what needs more registers or shared memory gets smaller tiles or more warps.

    Args:
        padded: channels, padded.
        element_bytes: of the queries.
        pairs: rows that the longest sequence needs.
        plain: the cache is not quantised.
    """
    if element_bytes > 2 or padded > 128:
        rows, slots, warps = 64, 32, 4
    else:
        rows, slots, warps = 128, 64, 8 if padded == 128 or not plain else 4
    return min(rows, power_of_two(pairs, 16)), slots, warps


def paged_prefill(
    q: torch.Tensor,
    layer: LayerKV,
    batch: Ragged,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See the reference."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    rows, heads, channels = q.shape
    out = torch.zeros((rows, heads, channels), device=q.device, dtype=q.dtype) if out is None else out
    lse = torch.full((rows, heads), float("-inf"), device=q.device, dtype=torch.float32) if with_lse else None
    codes, (scale_rows, offset_rows) = raw(storage(layer)), scales(layer)
    block_tokens, kv_heads = codes.shape[2:4]
    sequences, repeats = batch.q_lens.shape[0], heads // kv_heads
    if sequences == 0 or batch.q_len_max == 0:
        return out, lse
    padded = power_of_two(channels, 16)
    tile_rows, tile_slots, warps = _tile(
        padded, q.element_size(), batch.q_len_max * repeats, plain=isinstance(layer, torch.Tensor)
    )
    _prefill_kernel[(triton.cdiv(batch.q_len_max * repeats, tile_rows), kv_heads, sequences)](
        q,
        codes[:, 0],
        codes[:, 1],
        scale_rows[:, 0],
        scale_rows[:, 1],
        offset_rows[:, 0],
        offset_rows[:, 1],
        batch.tables,
        batch.q_starts,
        batch.q_lens,
        batch.kv_lens,
        out,
        out if lse is None else lse,
        scale * _LOG2_E,
        q.stride(0),
        q.stride(1),
        codes.stride(0),
        codes.stride(2),
        codes.stride(3),
        scale_rows.stride(0),
        scale_rows.stride(2),
        batch.tables.stride(0),
        HEADS=heads,
        REP=repeats,
        D=channels,
        P=padded,
        BLOCK_TOKENS=block_tokens,
        M=tile_rows,
        N=tile_slots,
        FORMAT=storage_format(layer),
        WITH_LSE=with_lse,
        num_warps=warps,
        num_stages=2,
    )
    return out, lse
