"""Writing into a paged KV cache and reading blocks of it, in plain PyTorch."""

from __future__ import annotations

import torch

from prismserve.kernels.affine import Quantised
from prismserve.kernels.fp8 import reference as fp8
from prismserve.kernels.int4 import reference as int4
from prismserve.kernels.int8 import reference as int8
from prismserve.kernels.paged_cache.layout import KVFormat, LayerKV, QuantisedLayer


def _quantise(rows: torch.Tensor, layer: QuantisedLayer) -> Quantised:
    dtype = layer.scale.dtype
    if layer.format is KVFormat.INT8:
        return int8.quantise_per_token(rows, symmetric=True, scale_dtype=dtype)
    if layer.format is KVFormat.INT4:
        return int4.quantise_per_token(rows, scale_dtype=dtype)
    return fp8.quantise_per_token(rows, scale_dtype=dtype)


def write_kv(layer: LayerKV, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Store keys and values into cache slots, in place; a quantised layer quantises each row.

    Args:
        layer: one layer of the cache.
        slots: [T] int64, ``group * block_tokens + offset``, distinct.
        keys: [T, kv_heads, head_dim], after RoPE; in the dtype of a plain layer.
        values: [T, kv_heads, head_dim].
    """
    if not isinstance(layer, QuantisedLayer):
        at = _places(slots, layer.shape[2])
        layer[:, 0].index_put_(at, keys)
        layer[:, 1].index_put_(at, values)
        return
    at = _places(slots, layer.codes.shape[2])
    for side, rows in ((0, keys), (1, values)):
        made = _quantise(rows, layer)
        # Bytes are moved: index_put_ does not know e4m3.
        layer.codes.view(torch.uint8)[:, side].index_put_(at, made.codes.view(torch.uint8))
        layer.scale[:, side].index_put_(at, made.scale.squeeze(-1))
        if layer.offset is not None and made.offset is not None:
            layer.offset[:, side].index_put_(at, made.offset.squeeze(-1))


def _places(slots: torch.Tensor, block_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return slots // block_tokens, slots % block_tokens


def read_blocks(
    layer: LayerKV, blocks: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole blocks, restored if the layer is quantised.

    Args:
        layer: one layer of the cache.
        blocks: [N] int32 or int64 groups, repeats allowed.
        dtype: of the result; None keeps the dtype of a plain layer and gives float32 for a quantised one.

    Returns:
        Two [N, block_tokens, kv_heads, head_dim].
    """
    if not isinstance(layer, QuantisedLayer):
        keys, values = (layer[:, side].index_select(0, blocks) for side in (0, 1))
        return (keys, values) if dtype is None else (keys.to(dtype), values.to(dtype))
    codes = layer.codes.view(torch.uint8).index_select(0, blocks).view(layer.codes.dtype)
    numbers = int4.unpack(codes) if layer.format is KVFormat.INT4 else codes
    restored = numbers.float() * layer.scale.index_select(0, blocks).float().unsqueeze(-1)
    if layer.offset is not None:
        restored += layer.offset.index_select(0, blocks).float().unsqueeze(-1)
    restored = restored.to(dtype or torch.float32)
    return restored[:, 0], restored[:, 1]
