"""Rotary position embedding: the angles of positions, and their application to queries and keys."""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_native, use_triton
from prismserve.kernels.rms_norm import rms_norm
from prismserve.kernels.rotary import reference
from prismserve.kernels.rotary.reference import rotary_angles


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the heads of every token: [T, H, d]; see :func:`reference.apply_rotary`."""
    if use_triton(x):
        from prismserve.kernels.rotary import triton

        return triton.apply_rotary(x, cos, sin)
    return reference.apply_rotary(x, cos, sin)


def rotate_heads(
    x: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    gains: tuple[torch.Tensor, torch.Tensor, int, float] | None = None,
) -> torch.Tensor:
    """Norm of every head where there are gains, then :func:`apply_rotary`; may overwrite ``x``.

    Args:
        x: [T, H, d].
        angles: cos and sin, each [T, d] float32.
        gains: of the query heads [d] and of the others [d], how many heads are queries, and the norm's eps.
    """
    if use_native(x) and x.stride(1) == x.shape[2] and x.stride(2) == 1:
        from prismserve.kernels.rotary import native

        return native.rotate_heads(x, angles, gains)
    if gains is not None:
        q_gain, k_gain, queries, eps = gains
        x = torch.cat((rms_norm(x[:, :queries], q_gain, eps), rms_norm(x[:, queries:], k_gain, eps)), dim=1)
    return apply_rotary(x, *angles)


__all__ = ["apply_rotary", "rotary_angles", "rotate_heads"]
