"""Paged attention in plain PyTorch: gather blocks, then scaled dot-product attention (float32 softmax)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from prismserve.kernels.paged_cache.reference import read_blocks
from prismserve.kernels.paged_decode.reference import paged_decode
from prismserve.kernels.paged_prefill.plan import Ragged
from prismserve.kernels.paged_prefill.reference import paged_prefill

if TYPE_CHECKING:
    from prismserve.kernels.paged_attention.plan import DecodeBucket, PagedBatch, PrefillSpan
    from prismserve.kernels.paged_cache.layout import LayerKV

# Rows of queries attended at once behind earlier context: bounds the causal mask SDPA needs there.
_TILE_ROWS = 256


def _gather(
    layer: LayerKV, blocks: torch.Tensor, sequences: int, slots: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, kv_heads, S, d] of sequences whose blocks lie one after another in ``blocks``."""
    keys, values = (
        side.reshape(sequences, -1, *side.shape[2:])[:, :slots].transpose(1, 2)
        for side in read_blocks(layer, blocks, dtype)
    )
    return keys, values


def _attend_bucket(q: torch.Tensor, layer: LayerKV, bucket: DecodeBucket, scale: float) -> torch.Tensor:
    """[B, H, d] for the single-token queries of one bucket."""
    sequences = bucket.rows.shape[0]
    keys, values = _gather(layer, bucket.blocks, sequences, bucket.slots, q.dtype)
    # The query heads that share a KV head see the same slots, so they stand in for query rows and no head is repeated.
    queries = q.index_select(0, bucket.rows).view(sequences, keys.shape[1], -1, q.shape[-1])
    out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bucket.visible, scale=scale)
    return out.reshape(sequences, -1, q.shape[-1])


def _attend_span(q: torch.Tensor, layer: LayerKV, span: PrefillSpan, scale: float, out: torch.Tensor) -> None:
    """Fill the rows of one sequence in ``out``."""
    keys, values = _gather(layer, span.blocks, 1, span.cached, q.dtype)
    queries = q[span.start : span.start + span.queries].transpose(0, 1).unsqueeze(0)
    rows = out[span.start : span.start + span.queries]
    earlier = span.cached - span.queries
    if earlier == 0:
        result = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
        rows.copy_(result[0].transpose(0, 1))
        return
    for first in range(0, span.queries, _TILE_ROWS):
        last = min(first + _TILE_ROWS, span.queries)
        seen = earlier + last
        positions = torch.arange(earlier + first, seen, device=q.device)
        mask = torch.arange(seen, device=q.device) <= positions[:, None]
        result = functional.scaled_dot_product_attention(
            queries[:, :, first:last],
            keys[:, :, :seen],
            values[:, :, :seen],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        rows[first:last].copy_(result[0].transpose(0, 1))


def check_rows(q: torch.Tensor, batch: PagedBatch, *, ragged: bool = False) -> None:
    """ValueError unless the batch was planned for as many rows as ``q``, and for this implementation."""
    if q.shape[0] != batch.rows:
        message = f"the batch was planned for {batch.rows} query rows, got {q.shape[0]}"
        raise ValueError(message)
    if (batch.ragged is not None) != ragged:
        message = "the batch was planned for another implementation: plan it for the device the queries are on"
        raise ValueError(message)


def attend(q: torch.Tensor, layer: LayerKV, batch: PagedBatch, scale: float) -> torch.Tensor:
    """Causal attention of every query row to its own sequence's cache.

    Row i of a sequence with q query rows and n cached tokens sees the first ``n - q + i + 1`` slots. No matrix of
    scores is kept outside the fused attention call.

    Args:
        q: [T, H, d], after RoPE; H is a multiple of kv_heads.
        layer: [groups, 2, block_tokens, kv_heads, d], or a quantised layer, with this step's keys and values written.
            Every element of a referenced block must be finite, also in slots not written yet (allocate it zeroed).
        batch: from :func:`plan_batch`, with as many rows as ``q``.
        scale: multiplies the scores, usually ``d ** -0.5``.

    Returns:
        [T, H, d] in the dtype of ``q``.

    Raises:
        ValueError: the batch was planned for another number of rows, or for the kernels.
    """
    check_rows(q, batch)
    out = torch.empty_like(q)
    for bucket in batch.buckets:
        out.index_copy_(0, bucket.rows, _attend_bucket(q, layer, bucket, scale))
    for span in batch.spans:
        _attend_span(q, layer, span, scale, out)
    return out


def attend_with_lse(
    q: torch.Tensor, layer: LayerKV, batch: PagedBatch, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`attend`, and the log-sum-exp of every row, with scores written out by tiles of rows.

    Returns:
        [T, H, d] in the dtype of ``q``, and [T, H] float32: the natural logarithm of the sum of exponentials of a
        row's scaled scores.

    Raises:
        ValueError: the batch was planned for another number of rows, or for the kernels.
    """
    check_rows(q, batch)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], device=q.device, dtype=torch.float32)
    for bucket in batch.buckets:
        chosen = bucket.rows
        tables = bucket.blocks.view(chosen.shape[0], -1)
        lens = torch.full_like(chosen, bucket.slots) if bucket.visible is None else bucket.visible.sum((1, 2, 3))
        attended, sums = paged_decode(q.index_select(0, chosen), layer, tables, lens, scale, with_lse=True)
        out.index_copy_(0, chosen, attended)
        if sums is not None:
            lse.index_copy_(0, chosen, sums)
    for span in batch.spans:
        rows = slice(span.start, span.start + span.queries)
        start, queries, cached = (torch.tensor([value], device=q.device) for value in (0, span.queries, span.cached))
        one = Ragged(
            tables=span.blocks[None],
            q_starts=start,
            q_lens=queries,
            kv_lens=cached,
            q_len_max=span.queries,
            kv_len_max=span.cached,
            q_total=span.queries,
            kv_total=span.cached,
        )
        attended, sums = paged_prefill(q[rows], layer, one, scale, with_lse=True)
        out[rows] = attended
        if sums is not None:
            lse[rows] = sums
    return out, lse
