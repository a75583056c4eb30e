"""Rotary position embedding: the angles of positions, and their application to queries and keys."""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_triton
from prismserve.kernels.rotary import reference
from prismserve.kernels.rotary.reference import rotary_angles


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the heads of every token: [T, H, d]; see :func:`reference.apply_rotary`."""
    if use_triton(x):
        from prismserve.kernels.rotary import triton

        return triton.apply_rotary(x, cos, sin)
    return reference.apply_rotary(x, cos, sin)


__all__ = ["apply_rotary", "rotary_angles"]
