"""Attention probabilities of a few query rows in plain PyTorch."""

from __future__ import annotations

import torch

from prismserve.kernels.paged_cache.layout import LayerKV, storage
from prismserve.kernels.paged_cache.reference import read_blocks
from prismserve.kernels.score_rows.plan import ScoreBatch


def score_rows(
    q: torch.Tensor, layer: LayerKV, batch: ScoreBatch, scale: float, *, lse: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax rows of a few queries over all keys they see, per query head.

    The cost is that of one product of the rows with the keys; no other rows of the attention matrix are computed.

    Args:
        q: [T, H, d], after RoPE; H is a multiple of kv_heads.
        layer: one layer of the cache, plain or quantised; only keys are read, so one side (``layer[:, :1]``) is enough.
        batch: from :func:`plan_rows`, with as many rows as ``q``.
        scale: multiplies the scores, usually ``d ** -0.5``.
        lse: [T, H] float32 log-sum-exp of the rows where attention has returned it already: saves a pass.

    Returns:
        probabilities [T, H, S] float32, zero where a row does not see, and lse [T, H] float32.
    """
    heads = q.shape[1]
    out = torch.zeros((q.shape[0], heads, batch.slots), device=q.device, dtype=torch.float32)
    sums = torch.empty(q.shape[:2], device=q.device, dtype=torch.float32)
    block_tokens = storage(layer).shape[2]
    sizes = zip(batch.starts.tolist(), batch.rows.tolist(), strict=True)
    for table, (start, count) in zip(batch.tables, sizes, strict=True):
        if count == 0:
            continue
        rows = slice(start, start + count)
        visible = batch.visible[rows]
        seen = int(visible.max())
        keys = read_keys(layer, table[: -(-seen // block_tokens)])[:seen]
        keys = keys.repeat_interleave(heads // keys.shape[1], dim=1)
        scores = torch.einsum("thd,shd->ths", q[rows].float(), keys) * scale
        hidden = torch.arange(seen, device=q.device) >= visible[:, None]
        scores.masked_fill_(hidden[:, None, :], float("-inf"))
        sums[rows] = scores.logsumexp(-1) if lse is None else lse[rows]
        out[rows, :, :seen] = (scores - sums[rows].unsqueeze(-1)).exp()
    return out, sums


def read_keys(layer: LayerKV, blocks: torch.Tensor) -> torch.Tensor:
    """[N * block_tokens, kv_heads, d] float32 keys of blocks."""
    if isinstance(layer, torch.Tensor):
        return layer[:, 0].index_select(0, blocks).flatten(0, 1).float()
    return read_blocks(layer, blocks, torch.float32)[0].flatten(0, 1)
