"""Attention of a whole step as one native kernel, which reads the cache where it lies.

A row's result has the same bits in whatever chunk or batch it is computed.
"""

from __future__ import annotations

import torch

from prismserve.kernels.native.library import ELEMENTS, call, strides
from prismserve.kernels.paged_cache.layout import LayerKV
from prismserve.kernels.paged_cache.reference import read_blocks
from prismserve.kernels.paged_prefill.plan import Ragged


def _attend(
    q: torch.Tensor, layer: LayerKV, batch: Ragged, scale: float, *, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, heads, width = q.shape
    if rows != batch.q_total:
        message = f"the batch was planned for {batch.q_total} query rows, got {rows}"
        raise ValueError(message)
    plain, tables = _plain(layer, batch.tables)
    q32 = q if q.dtype is torch.float32 else q.float()
    if q32.stride(2) != 1 or q32.stride(1) != width:
        q32 = q32.contiguous()
    out = torch.empty((rows, heads, width), dtype=torch.float32)
    lse = torch.empty((rows, heads), dtype=torch.float32) if with_lse else None
    group, side, slot, head, _ = plain.stride()
    call(
        "attend",
        plain.data_ptr(),
        ELEMENTS[plain.dtype],
        strides((group, side, slot, head)),
        plain.shape[2],
        plain.shape[3],
        width,
        q32.data_ptr(),
        q32.stride(0),
        heads,
        tables.data_ptr(),
        tables.shape[1],
        batch.q_starts.data_ptr(),
        batch.q_lens.data_ptr(),
        batch.kv_lens.data_ptr(),
        tables.shape[0],
        scale,
        out.data_ptr(),
        None if lse is None else lse.data_ptr(),
        torch.get_num_threads(),
    )
    return out if q.dtype is torch.float32 else out.to(q.dtype), lse


def _plain(layer: LayerKV, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer the kernel can read, and tables into it: a quantised one is restored, the blocks in use only."""
    if isinstance(layer, torch.Tensor) and layer.dtype in ELEMENTS and layer.stride(4) == 1:
        return layer, tables
    restored = torch.stack(read_blocks(layer, tables.reshape(-1), torch.float32), dim=1)
    return restored, torch.arange(tables.numel(), dtype=torch.int32).view(tables.shape)


def attend(q: torch.Tensor, layer: LayerKV, batch: Ragged, scale: float) -> torch.Tensor:
    """As the reference, over the sequences of a step planned for this kernel; ValueError if it has other rows."""
    return _attend(q, layer, batch, scale, with_lse=False)[0]


def attend_with_lse(q: torch.Tensor, layer: LayerKV, batch: Ragged, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference, over the sequences of a step planned for this kernel; ValueError if it has other rows."""
    out, lse = _attend(q, layer, batch, scale, with_lse=True)
    return out, torch.empty(q.shape[:2], dtype=torch.float32) if lse is None else lse
