"""Causal attention of a chunk of each sequence over its paged cache, with optional log-sum-exp."""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_triton
from prismserve.kernels.paged_cache.layout import LayerKV
from prismserve.kernels.paged_prefill import flash, reference
from prismserve.kernels.paged_prefill.plan import Ragged, plan_ragged


def paged_prefill(
    q: torch.Tensor,
    layer: LayerKV,
    batch: Ragged,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[T, H, d] and [T, H] float32 or None; see :func:`reference.paged_prefill`."""
    if isinstance(layer, torch.Tensor) and flash.usable(q, layer):
        out = torch.zeros_like(q) if out is None else out
        return out, flash.paged_prefill(q, layer, batch, scale, out=out, with_lse=with_lse)
    if use_triton(q):
        from prismserve.kernels.paged_prefill import triton

        return triton.paged_prefill(q, layer, batch, scale, out=out, with_lse=with_lse)
    return reference.paged_prefill(q, layer, batch, scale, out=out, with_lse=with_lse)


__all__ = ["Ragged", "paged_prefill", "plan_ragged"]
