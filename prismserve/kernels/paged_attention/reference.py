"""Paged attention in plain PyTorch: gather blocks, then scaled dot-product attention (float32 softmax)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from prismserve.kernels.paged_attention.plan import plan_batch

if TYPE_CHECKING:
    from prismserve.kernels.paged_attention.plan import DecodeBucket, PagedBatch, PrefillSpan

# Rows of queries attended at once behind earlier context: bounds the causal mask SDPA needs there.
_TILE_ROWS = 256


def write_kv(layer: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Store keys and values into cache slots, in place.

    Args:
        layer: [groups, 2, block_tokens, kv_heads, head_dim] view of one layer of the cache.
        slots: [T] int64, ``group * block_tokens + offset``, distinct.
        keys: [T, kv_heads, head_dim], after RoPE, in the dtype of ``layer``.
        values: [T, kv_heads, head_dim].
    """
    block_tokens = layer.shape[2]
    groups, offsets = slots // block_tokens, slots % block_tokens
    layer[:, 0].index_put_((groups, offsets), keys)
    layer[:, 1].index_put_((groups, offsets), values)


def _gather(layer: torch.Tensor, blocks: torch.Tensor, sequences: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, kv_heads, S, d] of sequences whose blocks lie one after another in ``blocks``."""
    heads, width = layer.shape[3:]
    keys, values = (
        layer[:, part].index_select(0, blocks).view(sequences, -1, heads, width)[:, :slots].transpose(1, 2)
        for part in (0, 1)
    )
    return keys, values


def _attend_bucket(q: torch.Tensor, layer: torch.Tensor, bucket: DecodeBucket, scale: float) -> torch.Tensor:
    """[B, H, d] for the single-token queries of one bucket."""
    sequences = bucket.rows.shape[0]
    keys, values = _gather(layer, bucket.blocks, sequences, bucket.slots)
    # The query heads that share a KV head see the same slots, so they stand in for query rows and no head is repeated.
    queries = q.index_select(0, bucket.rows).view(sequences, layer.shape[3], -1, q.shape[-1])
    out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bucket.visible, scale=scale)
    return out.reshape(sequences, -1, q.shape[-1])


def _attend_span(q: torch.Tensor, layer: torch.Tensor, span: PrefillSpan, scale: float, out: torch.Tensor) -> None:
    """Fill the rows of one sequence in ``out``."""
    keys, values = _gather(layer, span.blocks, 1, span.cached)
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


def attend(q: torch.Tensor, layer: torch.Tensor, batch: PagedBatch, scale: float) -> torch.Tensor:
    """Causal attention of every query row to its own sequence's cache.

    Row i of a sequence with q query rows and n cached tokens sees the first ``n - q + i + 1`` slots. No matrix of
    scores is kept outside the fused attention call.

    Args:
        q: [T, H, d], after RoPE; H is a multiple of kv_heads.
        layer: [groups, 2, block_tokens, kv_heads, d] with this step's keys and values written. Every element of a
            referenced block must be finite, also in slots not written yet (allocate the cache zeroed).
        batch: from :func:`plan_batch`, with as many rows as ``q``.
        scale: multiplies the scores, usually ``d ** -0.5``.

    Returns:
        [T, H, d] in the dtype of ``q``.

    Raises:
        ValueError: the batch was planned for another number of rows.
    """
    if q.shape[0] != batch.rows:
        message = f"the batch was planned for {batch.rows} query rows, got {q.shape[0]}"
        raise ValueError(message)
    out = torch.empty_like(q)
    for bucket in batch.buckets:
        out.index_copy_(0, bucket.rows, _attend_bucket(q, layer, bucket, scale))
    for span in batch.spans:
        _attend_span(q, layer, span, scale, out)
    return out


def paged_attention(
    q: torch.Tensor,
    layer: torch.Tensor,
    tables: Sequence[Sequence[int]],
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """:func:`plan_batch` and :func:`attend` in one call, where a plan would be used only once."""
    return attend(q, layer, plan_batch(tables, q_lens, kv_lens, layer.shape[2], q.device), scale)
