"""The memory of the KV pool: plain keys and values, or codes with the scales that restore them.

Everything that moves KV (copy-on-write, compaction, swapping, the exact wire) moves what lies in memory as it is, so a
key or value is quantised once, from the number the model computed, and never again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from prismserve.core.errors import EngineError
from prismserve.kernels.paged_cache import KVFormat, LayerKV, QuantisedLayer, read_blocks, write_kv

if TYPE_CHECKING:
    from prismserve.core.types import KVLayout

_CODE_DTYPES = {KVFormat.FP8: torch.float8_e4m3fn, KVFormat.INT8: torch.int8, KVFormat.INT4: torch.uint8}
_SCALE_DTYPE = torch.float16
_PAGE_BYTES = 4096


class KVStorage:
    """Tensors that share the axes [groups, layers, 2 (keys, values), block_tokens, kv_heads].

    Plain layouts have one of them, [..., head_dim] in the layout's dtype. Quantised ones have the codes as bytes
    [..., head_dim, or head_dim / 2 for int4], a float16 scale [...] and, for int4, a float16 offset [...].

    A *row* is what they hold of one token, head and side: [head_dim] in the layout's dtype, or uint8 [row_bytes], the
    codes followed by scale and offset.

    Attributes:
        parts: the tensors.
        dtype: of keys and values as attention sees them.
    """

    def __init__(self, layout: KVLayout, groups: int, device: torch.device | str) -> None:
        """Allocate zeros; EngineError if the format cannot hold the heads."""
        self.layout = layout
        self.dtype: torch.dtype = getattr(torch, layout.dtype)
        self._format = KVFormat(layout.kv_format) if layout.quantised else None
        rows = (groups, layout.layers, 2, layout.block_tokens, layout.kv_heads)
        if self._format is None:
            self.parts: tuple[torch.Tensor, ...] = (_zeros((*rows, layout.head_dim), self.dtype, device),)
        else:
            if layout.head_dim % 2:
                message = (
                    f"a {layout.kv_format} KV pool needs heads of an even number of channels, {layout.head_dim} given"
                )
                raise EngineError(message)
            width = layout.head_dim // 2 if self._format is KVFormat.INT4 else layout.head_dim
            scales = [torch.zeros(rows, dtype=_SCALE_DTYPE, device=device) for _ in range(self._scales)]
            self.parts = (torch.zeros((*rows, width), dtype=torch.uint8, device=device), *scales)
        self._flat = tuple(part.flatten(0, 1) for part in self.parts)
        self.blocks = self._view(self._flat)
        """Every layer's block by itself, as one layer of ``groups * layers`` groups."""

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self.parts[0].device

    @property
    def block_bytes(self) -> int:
        """Memory of one layer's block."""
        return sum(part[0].nbytes for part in self._flat)

    @property
    def _scales(self) -> int:
        return 2 if self._format is KVFormat.INT4 else 1

    def layer(self, layer: int) -> LayerKV:
        """One layer of every group, as the kernels take it; shares memory."""
        return self._view(tuple(part[:, layer] for part in self.parts))

    def _view(self, parts: tuple[torch.Tensor, ...]) -> LayerKV:
        if self._format is None:
            return parts[0]
        return QuantisedLayer(
            self._format,
            parts[0].view(_CODE_DTYPES[self._format]),
            parts[1],
            parts[2] if self._format is KVFormat.INT4 else None,
        )

    # ---- whole blocks ----------------------------------------------------------------------------------------

    def copy_tokens(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` tokens of every layer of one group to another."""
        for part in self.parts:
            part[target, :, :, :tokens].copy_(part[source, :, :, :tokens])

    def take_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copies of single-layer blocks ([n] int64), a tensor per part, on the CPU."""
        return tuple(part.index_select(0, blocks).to("cpu") for part in self._flat)

    @property
    def group_bytes(self) -> int:
        """Memory of one group: every layer's block."""
        return self.layout.layers * self.block_bytes

    def copy_group_out(self, group: int, target: torch.Tensor) -> None:
        """Copy one group, part after part, into uint8 [group_bytes] on the CPU."""
        first = 0
        for part in self.parts:
            nbytes = part[group].nbytes
            target[first : first + nbytes].copy_(part[group].view(-1).view(torch.uint8))
            first += nbytes

    def copy_group_in(self, group: int, source: torch.Tensor) -> None:
        """Write what :meth:`copy_group_out` gave."""
        first = 0
        for part in self.parts:
            nbytes = part[group].nbytes
            part[group].view(-1).view(torch.uint8).copy_(source[first : first + nbytes])
            first += nbytes

    def group_view(self, group: int) -> torch.Tensor | None:
        """What :meth:`copy_group_in` writes, uint8 [group_bytes], as memory to be written into.

        None where it is no single piece of host memory: codes and scales lie apart, and a device's memory is elsewhere.
        """
        if len(self.parts) > 1 or self.device.type != "cpu":
            return None
        return self.parts[0][group].view(-1).view(torch.uint8)

    def put_blocks(self, blocks: torch.Tensor, taken: tuple[torch.Tensor, ...]) -> None:
        """Write what :meth:`take_blocks` gave into ``blocks``."""
        for part, source in zip(self._flat, taken, strict=True):
            part[blocks] = source.to(part.device)

    # ---- tokens ----------------------------------------------------------------------------------------------

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store numbers, quantising each row where the format asks for it.

        Args:
            slots: [T] int64, ``block * block_tokens + offset`` over single-layer blocks.
            keys: [T, kv_heads, head_dim] floating point.
            values: as ``keys``.
        """
        if self._format is None:
            keys, values = keys.to(self.parts[0]), values.to(self.parts[0])
        write_kv(self.blocks, slots, keys.to(self.device), values.to(self.device))

    def write_rows(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store rows as :meth:`read_rows` gives them, two [T, kv_heads, *row]."""
        size = self.layout.block_tokens
        at = (slots // size, slots % size)
        for side, rows in enumerate((keys, values)):
            for part, piece in zip(self._flat, self._split(rows.to(self.device)), strict=True):
                part[:, side].index_put_(at, piece)

    def read(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of single-layer blocks: keys and values, each [n * block_tokens, kv_heads, head_dim]."""
        keys, values = read_blocks(self.blocks, blocks, self.dtype)
        return keys.flatten(0, 1), values.flatten(0, 1)

    def read_rows(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of single-layer blocks as they lie in memory: two [n * block_tokens, kv_heads, *row]."""
        taken = [part.index_select(0, blocks) for part in self._flat]
        keys, values = (self._join([part[:, side].flatten(0, 1) for part in taken]) for side in (0, 1))
        return keys, values

    def is_rows(self, keys: torch.Tensor) -> bool:
        """Whether a tensor holds rows of a quantised layout rather than numbers."""
        return self._format is not None and keys.dtype is torch.uint8

    def _join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        if self._format is None:
            return parts[0]
        return torch.cat([parts[0], *(scale.unsqueeze(-1).view(torch.uint8) for scale in parts[1:])], dim=-1)

    def _split(self, rows: torch.Tensor) -> list[torch.Tensor]:
        if self._format is None:
            return [rows.to(self.dtype)]
        width = self.parts[0].shape[-1]
        pieces = [rows[..., :width]]
        for index in range(self._scales):
            first = width + index * _SCALE_DTYPE.itemsize
            scale = rows[..., first : first + _SCALE_DTYPE.itemsize].contiguous()
            pieces.append(scale.view(_SCALE_DTYPE).squeeze(-1))
        return pieces


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Zeros; in host memory they begin with a page, so that files can be read straight into blocks of whole pages."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = torch.zeros(nbytes + _PAGE_BYTES, dtype=torch.uint8)
    first = -memory.data_ptr() % _PAGE_BYTES
    return memory[first : first + nbytes].view(dtype).view(shape)
