"""Rotary embedding and cache write in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.kernels.paged_cache.triton import rotate_and_write

if TYPE_CHECKING:
    import torch

    from prismserve.kernels.paged_cache.layout import LayerKV


def rotary_write(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    layer: LayerKV,
    slots: torch.Tensor,
) -> torch.Tensor:
    """See the reference."""
    return rotate_and_write(qkv, (cos, sin), layer, slots)
