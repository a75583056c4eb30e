"""Causal attention of several query rows per sequence over a paged cache in plain PyTorch, by tiles of rows."""

from __future__ import annotations

import torch

from prismserve.kernels.paged_cache.layout import LayerKV, storage
from prismserve.kernels.paged_cache.reference import read_blocks
from prismserve.kernels.paged_prefill.plan import Ragged

_TILE_ROWS = 256


def paged_prefill(
    q: torch.Tensor,
    layer: LayerKV,
    batch: Ragged,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend causally, every query row to its own sequence.

    Args:
        q: [T, H, d], after RoPE; H is a multiple of kv_heads.
        layer: one layer of the cache, plain or quantised, with the new keys and values written.
        batch: the sequences.
        scale: multiplies the scores, usually ``d ** -0.5``.
        out: contiguous, as ``q``; rows of no sequence stay as they are. None allocates zeros.
        with_lse: also return the log-sum-exp.

    Returns:
        ``out``, and [T, H] float32: the natural logarithm of the sum of exponentials of a row's scaled scores, -inf for
        rows of no sequence; None if not asked for.
    """
    heads = q.shape[1]
    out = torch.zeros_like(q) if out is None else out
    lse = torch.full(q.shape[:2], float("-inf"), device=q.device, dtype=torch.float32) if with_lse else None
    block_tokens, kv_heads = storage(layer).shape[2:4]
    sizes = zip(*(side.tolist() for side in (batch.q_starts, batch.q_lens, batch.kv_lens)), strict=True)
    for table, (start, queries, cached) in zip(batch.tables, sizes, strict=True):
        if queries == 0:
            continue
        keys, values = read_blocks(layer, table[: -(-cached // block_tokens)], torch.float32)
        keys, values = (
            side.flatten(0, 1)[:cached].repeat_interleave(heads // kv_heads, dim=1) for side in (keys, values)
        )
        for first in range(0, queries, _TILE_ROWS):
            last = min(first + _TILE_ROWS, queries)
            rows = slice(start + first, start + last)
            scores = torch.einsum("thd,shd->hts", q[rows].float(), keys) * scale
            positions = torch.arange(cached - queries + first, cached - queries + last, device=q.device)
            hidden = torch.arange(cached, device=q.device) > positions[:, None]
            scores.masked_fill_(hidden, float("-inf"))
            out[rows] = torch.einsum("hts,shd->thd", scores.softmax(-1), values).to(q.dtype)
            if lse is not None:
                lse[rows] = scores.logsumexp(-1).t()
    return out, lse
