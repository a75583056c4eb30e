"""Root-mean-square normalisation over the last axis, alone or fused with the residual addition before it."""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_native, use_triton
from prismserve.kernels.rms_norm import reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., D] normalised; see :func:`reference.rms_norm`."""
    if use_triton(x):
        from prismserve.kernels.rms_norm import triton

        return triton.rms_norm(x, weight, eps)
    if use_native(x):
        from prismserve.kernels.rms_norm import native

        return native.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``x + residual``, and the sum; see :func:`reference.add_rms_norm`."""
    if use_triton(x):
        from prismserve.kernels.rms_norm import triton

        return triton.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


__all__ = ["add_rms_norm", "rms_norm"]
