"""Embeddings of images in a worker's tiers: cut into blocks, which then sink, move, are checked and evicted like any other.

The first block of an image lies under the image's own key, so that the index tells routers who holds it; the others
under keys derived from that. An image begins with a header, which says how long it is.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import torch

from prismserve.core.hashing import digest
from prismserve.engine.image_cache import VisualTokens
from prismserve.kv_transfer.tiers.eviction import OWNER_BYTES, Label

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.engine.image_cache import ImageCache
    from prismserve.kv_transfer.tiers.store import TierStore

VERSION: Final = 1
_HEADER: Final = struct.Struct("<4sIIIIIQQQ")
"""Magic, version, dtype, axes of positions, whether an order follows, zero, rows, columns, tokens before compression."""
_HEADER_BYTES: Final = _HEADER.size
_MAGIC: Final = b"PSIM"
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_WAITING_MAX: Final = 65_536
_INT64_BYTES: Final = 8


class ImageShelf:
    """Puts images into tiers and finds them there.

    Args:
        cache: the images a worker holds ready.
        block_bytes: of the tiers' blocks.
    """

    def __init__(self, cache: ImageCache, block_bytes: int) -> None:
        self._cache = cache
        self._block_bytes = block_bytes
        self._waiting: OrderedDict[bytes, tuple[bytes, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._packed: tuple[bytes, torch.Tensor, Label] | None = None

    def blocks(self, nbytes: int) -> int:
        """Blocks that an image of so many bytes takes."""
        return -(-(nbytes + _HEADER_BYTES) // self._block_bytes)

    def parts(self, key: bytes) -> list[bytes]:
        """The keys under which an image that is held ready is to be kept, first to last; none if it is gone."""
        tokens = self._cache.get(key)
        if tokens is None:
            return []
        keys = part_keys(key, self.blocks(tokens.nbytes))
        with self._lock:
            self._waiting.update((part, (key, index)) for index, part in enumerate(keys))
            while len(self._waiting) > _WAITING_MAX:
                self._waiting.popitem(last=False)
        return keys

    def copy_part(self, part: bytes, target: torch.Tensor) -> Label | None:
        """Copy one block of an image into uint8 [block_bytes]; None if it is of no image that is held ready.

        Called from the one thread that fills the tiers.
        """
        with self._lock:
            key, index = self._waiting.pop(part, (b"", 0))
        if not key:
            return None
        if self._packed is None or self._packed[0] != key:
            tokens, label = self._cache.get(key), self._cache.label(key)
            if tokens is None or label is None:
                return None
            self._packed = (key, pack(tokens), Label(owner_bytes(label.owner), label.share))
        _, data, named = self._packed
        piece = data[index * self._block_bytes : (index + 1) * self._block_bytes]
        target[: len(piece)].copy_(piece)
        target[len(piece) :].zero_()
        if (index + 1) * self._block_bytes >= len(data):
            self._packed = None
        return named

    def load(self, key: bytes, store: TierStore) -> VisualTokens | None:
        """Read an image out of the tiers; None if a part of it is not there, or is not what was put there."""
        first = torch.empty(self._block_bytes, dtype=torch.uint8)
        if store.read_run([key], [first]) < 1:
            return None
        nbytes = packed_bytes(first)
        if nbytes is None:
            return None
        keys = part_keys(key, -(-nbytes // self._block_bytes))
        data = torch.empty((len(keys), self._block_bytes), dtype=torch.uint8)
        data[0].copy_(first)
        if store.read_run(keys[1:], list(data[1:].unbind(0))) < len(keys) - 1:
            return None
        return unpack(data.view(-1)[:nbytes])


def part_keys(key: bytes, count: int) -> list[bytes]:
    """Keys of the blocks of an image."""
    return [key, *(digest("image-part", key, index.to_bytes(4, "little")) for index in range(1, count))]


def owner_bytes(owner: str) -> bytes:
    """How tiers name a tenant; zeros for the default one."""
    return digest("tier-owner", owner.encode())[:OWNER_BYTES] if owner else bytes(OWNER_BYTES)


def pack(tokens: VisualTokens) -> torch.Tensor:
    """An image as uint8 [n] on the CPU: header, embeddings, positions, order."""
    rows, columns = tokens.embeds.shape
    axes = tokens.positions.shape[0] if tokens.positions.ndim > 1 else 0
    dtype = _DTYPES.index(tokens.embeds.dtype)
    header = _HEADER.pack(
        _MAGIC, VERSION, dtype, axes, int(tokens.order is not None), 0, rows, columns, tokens.raw_tokens
    )
    parts: Sequence[torch.Tensor] = [
        torch.frombuffer(bytearray(header), dtype=torch.uint8),
        _as_bytes(tokens.embeds.detach().cpu()),
        _as_bytes(tokens.positions),
        *(() if tokens.order is None else (_as_bytes(tokens.order),)),
    ]
    return torch.cat(list(parts))


def packed_bytes(start: torch.Tensor) -> int | None:
    """Length of the image whose first bytes these are; None if they are of no image."""
    raw = start[:_HEADER_BYTES].numpy().tobytes()
    if len(raw) < _HEADER_BYTES:
        return None
    magic, version, dtype, axes, ordered, _, rows, columns, _ = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != VERSION or dtype >= len(_DTYPES):
        return None
    positions = rows * max(1, axes) * _INT64_BYTES
    embeds = rows * columns * _DTYPES[dtype].itemsize
    return int(_HEADER_BYTES + embeds + positions + ordered * rows * _INT64_BYTES)


def unpack(data: torch.Tensor) -> VisualTokens:
    """The image in what :func:`pack` gave."""
    raw = data[:_HEADER_BYTES].numpy().tobytes()
    _, _, dtype, axes, ordered, _, rows, columns, raw_tokens = _HEADER.unpack_from(raw)
    at = _HEADER_BYTES
    embeds = data[at : at + rows * columns * _DTYPES[dtype].itemsize].clone().view(_DTYPES[dtype]).view(rows, columns)
    at += embeds.nbytes
    shape = (axes, rows) if axes else (rows,)
    positions = data[at : at + rows * max(1, axes) * _INT64_BYTES].clone().view(torch.int64).view(shape)
    at += positions.nbytes
    order = data[at : at + rows * _INT64_BYTES].clone().view(torch.int64) if ordered else None
    return VisualTokens(embeds, positions, raw_tokens, order)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
