"""Rotary embedding of queries and keys fused with writing keys and values into the cache."""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_triton
from prismserve.kernels.paged_cache.layout import LayerKV
from prismserve.kernels.rotary_write import reference


def rotary_write(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    layer: LayerKV,
    slots: torch.Tensor,
) -> torch.Tensor:
    """The rotated queries [T, H, d]; keys and values are in the cache; see :func:`reference.rotary_write`."""
    if use_triton(slots):
        from prismserve.kernels.rotary_write import triton

        return triton.rotary_write(qkv, cos, sin, layer, slots)
    return reference.rotary_write(qkv, cos, sin, layer, slots)


__all__ = ["rotary_write"]
