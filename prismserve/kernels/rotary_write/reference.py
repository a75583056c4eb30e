"""Rotary embedding and cache write in plain PyTorch: the two ops one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.kernels.paged_cache.reference import write_kv
from prismserve.kernels.rotary.reference import apply_rotary

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
    """Rotate queries and keys, and store keys and values.

    Args:
        qkv: q [T, H, d], k and v [T, kv_heads, d], before RoPE, of one dtype; views of one projection are fine.
        cos: [T, d] float32, from :func:`prismserve.kernels.rotary.rotary_angles`.
        sin: [T, d] float32.
        layer: one layer of the cache, plain or quantised; written in place.
        slots: [T] int64, ``group * block_tokens + offset``, distinct.

    Returns:
        The rotated queries [T, H, d].
    """
    q, k, v = qkv
    write_kv(layer, slots, apply_rotary(k, cos, sin), v)
    return apply_rotary(q, cos, sin)
