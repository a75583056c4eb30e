"""Selection of the best-scored tokens in plain PyTorch."""

from __future__ import annotations

import torch


def check_selection(scores: torch.Tensor, keep: int) -> None:
    """ValueError unless ``scores`` is [H, N] float32 and ``keep`` lies in 0..N."""
    if scores.dim() != 2 or scores.dtype != torch.float32:
        message = f"scores must be a float32 [H, N] tensor, got {scores.dtype} {list(scores.shape)}"
        raise ValueError(message)
    if not 0 <= keep <= scores.shape[1]:
        message = f"keep must lie between 0 and the {scores.shape[1]} tokens scored, got {keep}"
        raise ValueError(message)


def top_k(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the best tokens of each row, in their original order; of equal scores the earlier token wins.

    Args:
        scores: [H, N] float32 without NaN; H is 1 where all heads keep the same tokens.
        keep: K, tokens to keep, 0..N.

    Returns:
        [H, K] int64, ascending.

    Raises:
        ValueError: ``scores`` or ``keep`` is not of this form.
    """
    check_selection(scores, keep)
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :keep]
    return best.sort(dim=1).values


def gather_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of the tokens that each head kept.

    Args:
        x: [N, H, d]: keys or values, or hidden states as [N, 1, D].
        indices: [H, K] int64.

    Returns:
        [K, H, d] contiguous.
    """
    return x.gather(0, indices.t().unsqueeze(-1).expand(-1, -1, x.shape[-1]))
