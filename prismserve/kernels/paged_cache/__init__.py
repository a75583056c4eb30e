"""One layer of a paged KV cache, plain or quantised, and writing into it."""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_native, use_triton
from prismserve.kernels.paged_cache import native, reference
from prismserve.kernels.paged_cache.layout import (
    KVFormat,
    LayerKV,
    QuantisedLayer,
    by_slot,
    new_quantised_layer,
    slot_blocks,
)
from prismserve.kernels.paged_cache.reference import read_blocks


def write_kv(layer: LayerKV, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Store keys and values into cache slots; see :func:`reference.write_kv`."""
    if use_triton(keys):
        from prismserve.kernels.paged_cache import triton

        triton.write_kv(layer, slots, keys, values)
        return
    if use_native(keys) and isinstance(layer, torch.Tensor) and native.writable(layer):
        native.write_kv(layer, slots, keys, values)
        return
    reference.write_kv(layer, slots, keys, values)


__all__ = [
    "KVFormat",
    "LayerKV",
    "QuantisedLayer",
    "by_slot",
    "new_quantised_layer",
    "read_blocks",
    "slot_blocks",
    "write_kv",
]
