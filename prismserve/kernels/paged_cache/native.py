"""Writing into a plain paged cache as a native kernel."""

from __future__ import annotations

import torch

from prismserve.kernels.native.library import ELEMENTS, call, strides


def writable(layer: object, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether :func:`write_kv` can store these rows into this layer."""
    plain = isinstance(layer, torch.Tensor) and layer.dtype in ELEMENTS and layer.stride(4) == 1
    return plain and all(
        side.dtype is torch.float32 and side.stride(2) == 1 and side.stride(1) == side.shape[2]
        for side in (keys, values)
    )


def write_kv(layer: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """As the reference, for float32 rows."""
    slots = slots.contiguous()
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
