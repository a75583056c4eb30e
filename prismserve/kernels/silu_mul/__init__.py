"""The gate of a SwiGLU block over fused gate and up projections."""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_native, use_triton
from prismserve.kernels.silu_mul import reference


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2F] to [..., F]; see :func:`reference.silu_mul`."""
    if use_triton(gate_up):
        from prismserve.kernels.silu_mul import triton

        return triton.silu_mul(gate_up)
    if use_native(gate_up):
        from prismserve.kernels.silu_mul import native

        return native.silu_mul(gate_up)
    return reference.silu_mul(gate_up)


__all__ = ["silu_mul"]
