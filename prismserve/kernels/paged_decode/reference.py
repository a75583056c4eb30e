"""Single-token attention over a paged cache in plain PyTorch, with scores written out."""

from __future__ import annotations

import torch

from prismserve.kernels.paged_cache.layout import LayerKV
from prismserve.kernels.paged_cache.reference import read_blocks


def paged_decode(
    q: torch.Tensor,
    layer: LayerKV,
    tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    *,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with one query row per sequence to all its cached tokens.

    Args:
        q: [B, H, d], after RoPE; H is a multiple of kv_heads.
        layer: one layer of the cache, plain or quantised.
        tables: [B, W] int32 or int64 groups; entries behind a sequence's last block are not looked at as groups, but
            must be valid ones here (0 will do).
        kv_lens: [B] int32 or int64 cached tokens, 0 for a row that is not in use.
        scale: multiplies the scores, usually ``d ** -0.5``.
        with_lse: also return the log-sum-exp.

    Returns:
        [B, H, d] in the dtype of ``q``, zero where a sequence is empty, and [B, H] float32: the natural logarithm of
        the sum of exponentials of a row's scaled scores, -inf where a sequence is empty; None if not asked for.
    """
    sequences, heads, channels = q.shape
    keys, values = read_blocks(layer, tables.reshape(-1), torch.float32)
    keys, values = (side.reshape(sequences, -1, *side.shape[2:]) for side in (keys, values))
    kv_heads = keys.shape[2]
    grouped = q.float().view(sequences, kv_heads, heads // kv_heads, channels)
    scores = torch.einsum("bgrd,bsgd->bgrs", grouped, keys) * scale
    visible = torch.arange(keys.shape[1], device=q.device) < kv_lens[:, None]
    scores.masked_fill_(~visible[:, None, None, :], float("-inf"))
    weights = scores.softmax(-1).masked_fill(~visible[:, None, None, :], 0.0)
    # What lies behind a sequence has weight 0, and must not count even if it is not a number.
    values = values.masked_fill(~visible[:, :, None, None], 0.0)
    out = torch.einsum("bgrs,bsgd->bgrd", weights, values).reshape(q.shape).to(q.dtype)
    return out, scores.logsumexp(-1).reshape(sequences, heads) if with_lse else None
