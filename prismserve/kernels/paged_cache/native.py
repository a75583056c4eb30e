"""Writing into a plain paged cache as a native kernel."""

from __future__ import annotations

import torch

from prismserve.kernels.native.library import ELEMENTS, call, strides


def writable(layer: torch.Tensor) -> bool:
    """Whether :func:`write_kv` can store into this layer."""
    return layer.dtype in ELEMENTS and layer.stride(4) == 1


def _heads_together(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(2) == 1 and rows.stride(1) == rows.shape[2] else rows.contiguous()


def write_kv(layer: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """As the reference, for float32 rows, rounded to the dtype of the layer."""
    slots, keys, values = slots.contiguous(), _heads_together(keys), _heads_together(values)
    group, side, slot, head, _ = layer.stride()
    call(
        "write_kv",
        layer.data_ptr(),
        ELEMENTS[layer.dtype],
        strides((group, side, slot, head)),
        layer.shape[2],
        layer.shape[3],
        layer.shape[4],
        slots.data_ptr(),
        slots.shape[0],
        keys.data_ptr(),
        keys.stride(0),
        values.data_ptr(),
        values.stride(0),
    )
