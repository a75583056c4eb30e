"""Attention of a whole step as kernels: decode for single-token queries, varlen prefill for the rest."""

from __future__ import annotations

import torch

from prismserve.kernels.paged_attention.plan import PagedBatch
from prismserve.kernels.paged_attention.reference import check_rows
from prismserve.kernels.paged_cache.layout import LayerKV
from prismserve.kernels.paged_decode.triton import paged_decode
from prismserve.kernels.paged_prefill import paged_prefill


def _attend(
    q: torch.Tensor, layer: LayerKV, batch: PagedBatch, scale: float, *, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_rows(q, batch, ragged=True)
    step = batch.ragged
    spans = None if step is None else step.spans
    singles = None if step is None else step.singles
    if spans is None:
        if singles is None:
            return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32) if with_lse else None
        return paged_decode(q, layer, singles.tables, singles.kv_lens, scale, with_lse=with_lse)
    out, lse = paged_prefill(q, layer, spans, scale, with_lse=with_lse)
    if singles is not None:
        rows = singles.q_starts.long()
        single, sums = paged_decode(
            q.index_select(0, rows), layer, singles.tables, singles.kv_lens, scale, with_lse=with_lse
        )
        out.index_copy_(0, rows, single)
        if lse is not None and sums is not None:
            lse.index_copy_(0, rows, sums)
    return out, lse


def attend(q: torch.Tensor, layer: LayerKV, batch: PagedBatch, scale: float) -> torch.Tensor:
    """As the reference, over a batch planned for the kernels.

    Raises:
        ValueError: the batch was planned for another number of rows, or for the reference.
    """
    return _attend(q, layer, batch, scale, with_lse=False)[0]


def attend_with_lse(
    q: torch.Tensor, layer: LayerKV, batch: PagedBatch, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference, over a batch planned for the kernels.

    Raises:
        ValueError: the batch was planned for another number of rows, or for the reference.
    """
    out, lse = _attend(q, layer, batch, scale, with_lse=True)
    return out, torch.empty(q.shape[:2], device=q.device, dtype=torch.float32) if lse is None else lse
