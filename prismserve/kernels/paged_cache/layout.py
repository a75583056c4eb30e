"""One layer of a paged KV cache, plain or quantised.

A plain layer is a view ``[groups, 2, block_tokens, kv_heads, head_dim]`` (0 keys, 1 values) in the model's dtype; only
its last axis has to be contiguous. A slot is ``group * block_tokens + offset``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


class KVFormat(Enum):
    """How a quantised layer stores a row: the channels of one token, head and side (key or value).

    Every row has its own scale, so that a token can be appended without touching others.
    """

    INT8 = "int8"
    """Symmetric codes -127..127 as int8."""
    INT4 = "int4"
    """Affine codes 0..15, two to a byte as :func:`prismserve.kernels.int4.pack` lays them out."""
    FP8 = "fp8"
    """e4m3."""


@dataclass(frozen=True, slots=True)
class QuantisedLayer:
    """Codes of a layer with what restores them: ``value = codes * scale + offset``.

    Attributes:
        format: meaning of the codes.
        codes: [groups, 2, block_tokens, kv_heads, head_dim] int8 or float8_e4m3fn, or [..., head_dim / 2] uint8 (int4).
        scale: [groups, 2, block_tokens, kv_heads] float16 or float32; the last axis contiguous.
        offset: as ``scale``, for int4; None otherwise.
    """

    format: KVFormat
    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.codes.shape[-1] * (2 if self.format is KVFormat.INT4 else 1)


LayerKV: TypeAlias = torch.Tensor | QuantisedLayer
"""What attention reads: a plain layer or a quantised one."""


def storage(layer: LayerKV) -> torch.Tensor:
    """The tensor whose first four axes are [groups, 2, block_tokens, kv_heads]."""
    return layer.codes if isinstance(layer, QuantisedLayer) else layer


def head_dim(layer: LayerKV) -> int:
    """Channels per head of either kind of layer."""
    return layer.head_dim if isinstance(layer, QuantisedLayer) else layer.shape[-1]


def by_slot(layer: LayerKV) -> LayerKV:
    """The same memory as blocks of one slot each: block :func:`slot_blocks` ``(layer, [slot])[0]`` is a slot's.

    Args:
        layer: whose groups lie a whole number of slots apart, as those of the KV pool do.

    Returns:
        A view [n, 2, 1, kv_heads, ...]; not every number below n is a slot of this layer.
    """
    if isinstance(layer, QuantisedLayer):
        offset = None if layer.offset is None else _by_slot(layer.offset)
        return QuantisedLayer(layer.format, _by_slot(layer.codes), _by_slot(layer.scale), offset)
    return _by_slot(layer)


def slot_blocks(layer: LayerKV, slots: Sequence[int]) -> list[int]:
    """Blocks of :func:`by_slot` that hold these slots (``group * block_tokens + offset``)."""
    rows = storage(layer)
    size, apart = rows.shape[2], _slots_apart(rows)
    return [slot // size * apart + slot % size for slot in slots]


def _slots_apart(rows: torch.Tensor) -> int:
    """How many slots would fit between the beginnings of two groups."""
    apart, rest = divmod(rows.stride(0), rows.stride(2))
    if rest:
        message = f"groups {rows.stride(0)} elements apart do not hold whole slots of {rows.stride(2)}"
        raise ValueError(message)
    return apart


def _by_slot(rows: torch.Tensor) -> torch.Tensor:
    groups, sides, size = rows.shape[:3]
    blocks = (groups - 1) * _slots_apart(rows) + size
    _, side, slot, *inner = rows.stride()
    return rows.as_strided((blocks, sides, 1, *rows.shape[3:]), (slot, side, slot, *inner))


def new_quantised_layer(
    kv_format: KVFormat,
    shape: tuple[int, int, int, int],
    *,
    device: torch.device | str = "cpu",
    scale_dtype: torch.dtype = torch.float32,
) -> QuantisedLayer:
    """A zeroed layer.

    Args:
        kv_format: how rows are stored.
        shape: groups, block_tokens, kv_heads, head_dim (even).
        device: where.
        scale_dtype: of ``scale`` and ``offset``.
    """
    groups, block_tokens, kv_heads, channels = shape
    rows = (groups, 2, block_tokens, kv_heads)
    width = channels // 2 if kv_format is KVFormat.INT4 else channels
    dtype = {KVFormat.INT8: torch.int8, KVFormat.INT4: torch.uint8, KVFormat.FP8: torch.float8_e4m3fn}[kv_format]
    return QuantisedLayer(
        kv_format,
        torch.zeros((*rows, width), device=device, dtype=dtype),
        torch.zeros(rows, device=device, dtype=scale_dtype),
        torch.zeros(rows, device=device, dtype=scale_dtype) if kv_format is KVFormat.INT4 else None,
    )
