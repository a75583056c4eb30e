"""Selection of the best-scored tokens, per head or for all heads, and gathering of what belongs to them."""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_native, use_triton
from prismserve.kernels.topk_gather import native, reference


def top_k(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """[H, K] int64 ascending indices of the best of [H, N]; see :func:`reference.top_k`."""
    if use_triton(scores):
        from prismserve.kernels.topk_gather import triton

        return triton.top_k(scores, keep)
    if use_native(scores):
        return native.top_k(scores, keep)
    return reference.top_k(scores, keep)


def gather_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[K, H, d] of [N, H, d]; see :func:`reference.gather_tokens`."""
    if use_triton(x):
        from prismserve.kernels.topk_gather import triton

        return triton.gather_tokens(x, indices)
    return reference.gather_tokens(x, indices)


def topk_gather(
    scores: torch.Tensor, keep: int, *tensors: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Keep the best tokens of each head.

    Args:
        scores: [H, N] float32 without NaN.
        keep: K, 0..N.
        tensors: each [N, H, d].

    Returns:
        indices [H, K] int64 ascending, and [K, H, d] of each tensor.

    Raises:
        ValueError: ``scores`` or ``keep`` is not of this form.
    """
    indices = top_k(scores, keep)
    return indices, tuple(gather_tokens(x, indices) for x in tensors)


__all__ = ["gather_tokens", "top_k", "topk_gather"]
