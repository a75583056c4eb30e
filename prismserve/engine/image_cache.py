"""Embeddings of images seen before, bounded in bytes, least recently used out first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """One image after encoder, compression and projector.

    Attributes:
        embeds: [k, D * (1 + n)] decoder inputs, followed by what is added to them after each of the first n layers.
        positions: [k] int64 on the CPU, ascending positions within the image; or [3, k], time, row and column.
        raw_tokens: tokens before compression.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    raw_tokens: int

    @property
    def nbytes(self) -> int:
        """Memory held by the tensors."""
        return self.embeds.nbytes + self.positions.nbytes


class ImageCache:
    """Key of an image's embeddings (``MediaSegment.key``) to the embeddings. Safe to use from several threads.

    Attributes:
        max_bytes: bound on the tensors held.
        on_change: called with (key, held) after a key was gained or lost, in the thread that caused it; it must
            return at once.
    """

    def __init__(self, max_bytes: int) -> None:
        """Hold at most ``max_bytes`` of tensors; 0 holds nothing."""
        self.max_bytes = max_bytes
        self.on_change: Callable[[bytes, bool], None] | None = None
        self._entries: OrderedDict[bytes, VisualTokens] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory held now."""
        return self._bytes

    def __len__(self) -> int:
        """Images held."""
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        """Whether the key is held; does not count as use."""
        with self._lock:
            return key in self._entries

    def get(self, key: bytes) -> VisualTokens | None:
        """The embeddings under ``key``, now the most recently used."""
        with self._lock:
            tokens = self._entries.get(key)
            if tokens is not None:
                self._entries.move_to_end(key)
            return tokens

    def put(self, key: bytes, tokens: VisualTokens) -> None:
        """Hold embeddings; one larger than the whole cache is not held. The tensors must not be changed afterwards."""
        size = tokens.nbytes
        changes: list[tuple[bytes, bool]] = []
        with self._lock:
            previous = self._entries.pop(key, None)
            if previous is not None:
                self._bytes -= previous.nbytes
            if size <= self.max_bytes:
                self._entries[key] = tokens
                self._bytes += size
            if (previous is not None) != (key in self._entries):
                changes.append((key, previous is None))
            while self._bytes > self.max_bytes:
                lost, evicted = self._entries.popitem(last=False)
                self._bytes -= evicted.nbytes
                changes.append((lost, False))
        if self.on_change is not None:
            for changed, held in changes:
                self.on_change(changed, held)

    def clear(self) -> None:
        """Hold nothing."""
        with self._lock:
            lost = list(self._entries)
            self._entries.clear()
            self._bytes = 0
        if self.on_change is not None:
            for key in lost:
                self.on_change(key, False)
