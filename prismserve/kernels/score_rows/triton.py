"""Probabilities of a few query rows in Triton: scores and partial sums by tiles of slots, then one normalising pass.

With a known log-sum-exp the first pass writes probabilities at once.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from prismserve.kernels.attention_tile import score_tile, slot_places
from prismserve.kernels.device import kernel, power_of_two, raw
from prismserve.kernels.paged_cache.layout import LayerKV, storage
from prismserve.kernels.paged_cache.triton import scales, storage_format
from prismserve.kernels.score_rows.plan import ScoreBatch

_SLOTS: Final = 64
_PAIRS_MAX: Final = 64
_LANES: Final = 1024


@kernel
def _score_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    key_scale: tl.tensor,
    key_offset: tl.tensor,
    tables: tl.tensor,
    starts: tl.tensor,
    counts: tl.tensor,
    visible: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    scale: tl.tensor,
    slots: tl.tensor,
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
    KNOWN: tl.constexpr,
) -> None:
    """One tile of slots for all rows of one sequence and KV head; parts are [T, HEADS, tiles] log-sum-exp."""
    part, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, pairs = tl.load(starts + sequence).to(tl.int64), tl.load(counts + sequence) * REP
    strides, scale_strides = (stride_group, stride_slot, stride_head), (stride_scale_group, stride_scale_slot)
    slot, lane = part * N + tl.arange(0, N), tl.arange(0, P)
    for first in range(0, pairs, M):
        pair = first + tl.arange(0, M)
        exists = pair < pairs
        row = start + pair // REP
        head = kv_head * REP + pair % REP
        seen = tl.load(visible + row, mask=exists, other=0)
        inside = slot < tl.max(seen, 0)
        live = exists[:, None] & (lane < D)[None, :]
        rows_q = tl.load(q + (row * stride_q + head * stride_qh)[:, None] + lane[None, :], mask=live, other=0.0)
        q_sum = tl.sum(rows_q.to(tl.float32), 1)
        table = tables + sequence * stride_table
        rows, scale_rows = slot_places(table, slot, inside, kv_head, strides, scale_strides, BLOCK_TOKENS)
        scores = score_tile(rows_q, q_sum, keys, key_scale, key_offset, rows, scale_rows, inside, D, P, FORMAT)
        scores = tl.where(slot[None, :] < seen[:, None], scores * scale, -float("inf"))
        at = row * HEADS + head
        if KNOWN:
            scores = tl.exp(scores - tl.load(lse + at, mask=exists, other=0.0)[:, None])
        else:
            most = tl.max(scores, 1)
            safe = tl.where(most == -float("inf"), 0.0, most)
            total = tl.sum(tl.exp(scores - safe[:, None]), 1)
            log_sum = tl.where(total > 0, safe + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
            tl.store(parts + at * tl.num_programs(0) + part, log_sum, mask=exists)
        target = out + at[:, None] * slots + slot[None, :]
        tl.store(target, scores, mask=exists[:, None] & (slot < slots)[None, :])


@kernel
def _normalise_kernel(
    out: tl.tensor,
    parts: tl.tensor,
    lse: tl.tensor,
    tiles: tl.tensor,
    slots: tl.tensor,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Turn LANES scores of one (row, head) into probabilities; the first program of a row also stores its sum."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tile = tl.arange(0, TILES)
    sums = tl.load(parts + row * tiles + tile, mask=tile < tiles, other=-float("inf"))
    most = tl.max(sums, 0)
    safe = tl.where(most == -float("inf"), 0.0, most)
    log_sum = safe + tl.log(tl.sum(tl.exp(sums - safe), 0))
    if part == 0:
        tl.store(lse + row, log_sum)
    slot = part * LANES + tl.arange(0, LANES)
    scores = tl.load(out + row * slots + slot, mask=slot < slots, other=-float("inf"))
    tl.store(out + row * slots + slot, tl.exp(scores - log_sum), mask=slot < slots)


def score_rows(
    q: torch.Tensor, layer: LayerKV, batch: ScoreBatch, scale: float, *, lse: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    rows, heads, channels = q.shape
    out = torch.empty((rows, heads, batch.slots), device=q.device, dtype=torch.float32)
    sums = torch.empty((rows, heads), device=q.device, dtype=torch.float32) if lse is None else lse.contiguous()
    if rows == 0:
        return out, sums
    codes, (scale_rows, offset_rows) = raw(storage(layer)), scales(layer)
    block_tokens, kv_heads = codes.shape[2:4]
    repeats = heads // kv_heads
    tiles = triton.cdiv(batch.slots, _SLOTS)
    parts = out.new_empty((rows, heads, tiles)) if lse is None else sums
    _score_kernel[(tiles, kv_heads, batch.starts.shape[0])](
        q,
        codes[:, 0],
        scale_rows[:, 0],
        offset_rows[:, 0],
        batch.tables,
        batch.starts,
        batch.rows,
        batch.visible,
        sums,
        out,
        parts,
        scale,
        batch.slots,
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
        P=power_of_two(channels, 16),
        BLOCK_TOKENS=block_tokens,
        M=min(_PAIRS_MAX, power_of_two(batch.rows_max * repeats, 16)),
        N=_SLOTS,
        FORMAT=storage_format(layer),
        KNOWN=lse is not None,
    )
    if lse is None:
        _normalise_kernel[(rows * heads, triton.cdiv(batch.slots, _LANES))](
            out, parts, sums, tiles, batch.slots, TILES=power_of_two(tiles), LANES=_LANES
        )
    return out, sums
