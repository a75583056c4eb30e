"""Causal attention of a step over a paged KV cache, and writing into it.

One layer of the cache is a view ``[groups, 2, block_tokens, kv_heads, head_dim]`` (0 keys, 1 values), of which only the
last axis has to be contiguous, or a quantised layer (:mod:`prismserve.kernels.paged_cache`). A slot is
``group * block_tokens + offset``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prismserve.kernels.paged_attention import reference
from prismserve.kernels.paged_attention.plan import PagedBatch, plan_batch
from prismserve.kernels.paged_cache import LayerKV, write_kv
from prismserve.kernels.paged_cache.layout import storage


def attend(q: torch.Tensor, layer: LayerKV, batch: PagedBatch, scale: float) -> torch.Tensor:
    """[T, H, d] of every query row over its own sequence's cache; see :func:`reference.attend`."""
    if batch.ragged is not None:
        from prismserve.kernels.paged_attention import triton

        return triton.attend(q, layer, batch, scale)
    if batch.native is not None:
        from prismserve.kernels.paged_attention import native

        return native.attend(q, layer, batch.native, scale)
    return reference.attend(q, layer, batch, scale)


def attend_with_lse(
    q: torch.Tensor, layer: LayerKV, batch: PagedBatch, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`attend` and the log-sum-exp [T, H] float32 of every row; see :func:`reference.attend_with_lse`."""
    if batch.ragged is not None:
        from prismserve.kernels.paged_attention import triton

        return triton.attend_with_lse(q, layer, batch, scale)
    if batch.native is not None:
        from prismserve.kernels.paged_attention import native

        return native.attend_with_lse(q, layer, batch.native, scale)
    return reference.attend_with_lse(q, layer, batch, scale)


def paged_attention(
    q: torch.Tensor,
    layer: LayerKV,
    tables: Sequence[Sequence[int]],
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """:func:`plan_batch` and :func:`attend` in one call, where a plan would be used only once."""
    return attend(q, layer, plan_batch(tables, q_lens, kv_lens, storage(layer).shape[2], q.device), scale)


__all__ = ["PagedBatch", "attend", "attend_with_lse", "paged_attention", "plan_batch", "write_kv"]
