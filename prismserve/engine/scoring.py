"""Attention scores recomputed from queries and keys: rows of the attention matrix, and sums over its columns.

Nothing here holds a context x context matrix: rows are few, and column sums go over tiles of rows.
"""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_triton
from prismserve.kernels.score_rows import score_dense_rows

_TILE_ELEMENTS = 4 << 20
"""Scores written out at one time: 16 MiB of float32."""


def score_rows(
    q: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, scale: float, first: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention probabilities of a few query rows.

    Args:
        q: [r, heads, d], after RoPE.
        keys: [n, kv_heads, d], after RoPE.
        visible: [r] int64 on the CPU; a row sees the slots before this one, at least 1.
        scale: multiplies the scores.
        first: [r] int64, the first slot a row sees where that is not slot 0.

    Returns:
        Probabilities [r, heads, n] and log-sum-exp [r, heads], both float32.
    """
    if first is None and use_triton(q):
        return score_dense_rows(q, keys, [slot - 1 for slot in visible.tolist()], scale)
    scores = _scores(q, keys, visible, scale, first)
    lse = scores.logsumexp(dim=-1)
    return scores.sub_(lse[:, :, None]).exp_(), lse


def received_sums(
    q: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    first: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that each slot receives from all rows together: sum over i of ``exp(q_i k_j scale - lse_i)`` (R4).

    Args:
        q: [r, heads, d], any number of rows; taken tile by tile.
        keys: as for :func:`score_rows`.
        visible: as for :func:`score_rows`.
        scale: multiplies the scores.
        first: as for :func:`score_rows`.
        lse: [r, heads] float32 where the main pass has returned it; saves a pass over each tile.

    Returns:
        [heads, n] float32.
    """
    rows, heads, _ = q.shape
    sums = torch.zeros((heads, keys.shape[0]), device=q.device, dtype=torch.float32)
    tile = max(1, _TILE_ELEMENTS // max(1, heads * keys.shape[0]))
    for start in range(0, rows, tile):
        part = slice(start, start + tile)
        scores = _scores(q[part], keys, visible[part], scale, None if first is None else first[part])
        row_lse = scores.logsumexp(dim=-1) if lse is None else lse[part]
        sums += scores.sub_(row_lse[:, :, None]).exp_().sum(dim=0)
    return sums


def summed_scores(query_sum: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Scores before softmax summed over query rows: ``(sum over i of q_i) k_j scale`` (R5), exact at O(n d).

    Args:
        query_sum: [heads, d] float32, queries after RoPE added up.
        keys: [n, kv_heads, d], after RoPE.
        scale: multiplies the scores.

    Returns:
        [heads, n] float32; pairs that the causal mask hides are part of the sums.
    """
    heads, width = query_sum.shape
    grouped = query_sum.view(keys.shape[1], -1, width)
    return torch.einsum("gqd,ngd->gqn", grouped, keys.float()).reshape(heads, -1).mul_(scale)


def _scores(
    q: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, scale: float, first: torch.Tensor | None
) -> torch.Tensor:
    """[r, heads, n] float32 scaled scores, -inf where a row may not look."""
    rows, heads, width = q.shape
    grouped = q.float().view(rows, keys.shape[1], -1, width)
    scores = torch.einsum("rgqd,ngd->rgqn", grouped, keys.float()).reshape(rows, heads, -1).mul_(scale)
    slots = torch.arange(keys.shape[0], device=q.device)
    hidden = slots >= visible.to(q.device)[:, None]
    if first is not None:
        hidden |= slots < first.to(q.device)[:, None]
    return scores.masked_fill_(hidden[:, None, :], -torch.inf)
