"""Attention probabilities of a few query rows, over a paged cache or dense keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prismserve.kernels.dispatch import use_triton
from prismserve.kernels.paged_cache.layout import LayerKV
from prismserve.kernels.score_rows import reference
from prismserve.kernels.score_rows.plan import ScoreBatch, plan_rows


def score_rows(
    q: torch.Tensor, layer: LayerKV, batch: ScoreBatch, scale: float, *, lse: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [T, H, S] and log-sum-exp [T, H], float32; see :func:`reference.score_rows`."""
    if use_triton(q):
        from prismserve.kernels.score_rows import triton

        return triton.score_rows(q, layer, batch, scale, lse=lse)
    return reference.score_rows(q, layer, batch, scale, lse=lse)


def score_dense_rows(
    q: torch.Tensor,
    keys: torch.Tensor,
    positions: Sequence[int],
    scale: float,
    *,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`score_rows` over the keys of one sequence that lie in one tensor: a cache of one block.

    Args:
        q: [T, H, d].
        keys: [S, kv_heads, d].
        positions: T of them; a row sees the keys up to and including its position (``S - 1`` for all of them).
        scale: multiplies the scores.
        lse: [T, H] float32 if known.

    Returns:
        Probabilities [T, H, S] and lse [T, H], float32.

    Raises:
        ValueError: a position lies outside 0..S-1.
    """
    tokens = keys.shape[0]
    batch = plan_rows([[0]], [positions], tokens, q.device)
    probabilities, sums = score_rows(q, keys[None, None], batch, scale, lse=lse)
    if batch.slots == tokens:
        return probabilities, sums
    return torch.nn.functional.pad(probabilities, (0, tokens - batch.slots)), sums


__all__ = ["ScoreBatch", "plan_rows", "score_dense_rows", "score_rows"]
