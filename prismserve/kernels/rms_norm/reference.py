"""RMSNorm in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in float32 for narrower dtypes (arXiv:1910.07467).

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of ``x``.
    """
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual stream, then :func:`rms_norm`.

    Args:
        x: [..., D], a block's output.
        residual: [..., D] in the dtype of ``x``.
        weight: [D].
        eps: added to the mean square.

    Returns:
        The norm of the sum, and the sum (rounded to the dtype of ``x``, which the norm sees).
    """
    total = x + residual
    return rms_norm(total, weight, eps), total
