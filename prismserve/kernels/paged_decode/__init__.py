"""Attention of one new token per sequence over a paged cache, with optional log-sum-exp."""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_triton
from prismserve.kernels.paged_cache.layout import LayerKV
from prismserve.kernels.paged_decode import reference


def paged_decode(
    q: torch.Tensor,
    layer: LayerKV,
    tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    *,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, H, d] and [B, H] float32 or None; see :func:`reference.paged_decode`."""
    if use_triton(q):
        from prismserve.kernels.paged_decode import triton

        return triton.paged_decode(q, layer, tables, kv_lens, scale, with_lse=with_lse)
    return reference.paged_decode(q, layer, tables, kv_lens, scale, with_lse=with_lse)


__all__ = ["paged_decode"]
