"""What tiers of equal slots have in common: which key lies in which slot, who reads it, and which slots are free."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Literal

from prismserve.kv_transfer.tiers.base import TierCounters
from prismserve.kv_transfer.tiers.eviction import Evictor, Label

if TYPE_CHECKING:
    from collections.abc import Sequence


class Slots:
    """Keys over equal slots, ranked for eviction. What changes them does so under ``_lock``.

    Attributes:
        block_bytes: every block is this long.
        counters: totals.
    """

    def __init__(self, slots: int, block_bytes: int, policy: Literal["lru", "gdsf"]) -> None:
        self.block_bytes = block_bytes
        self.counters = TierCounters()
        self._lock = threading.Lock()
        self._evictor = Evictor(slots, policy)
        self._slots: dict[bytes, int] = {}
        self._checksums: dict[bytes, bytes] = {}
        self._readers: dict[bytes, int] = {}
        self._free = list(range(slots - 1, -1, -1))

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        """Whether a block is held; does not count as use."""
        return key in self._slots

    def keys(self) -> list[bytes]:
        """Keys held, the first to leave first."""
        with self._lock:
            return self._evictor.keys()

    def label(self, key: bytes) -> Label | None:
        """What was said of a block when it was stored."""
        with self._lock:
            return self._evictor.label(key) if key in self._evictor else None

    def touch(self, run: Sequence[bytes]) -> None:
        """A run of blocks was used."""
        with self._lock:
            self._evictor.touch(run)

    def _hold(self, key: bytes, slot: int, checksum: bytes, label: Label) -> None:
        self._slots[key] = slot
        self._checksums[key] = checksum
        self._evictor.add(key, label)

    def _forget(self, key: bytes) -> int:
        """Let go of a key that is held; its slot, which the caller gives back."""
        del self._checksums[key]
        self._evictor.remove(key)
        return self._slots.pop(key)

    def _retire(self, key: bytes) -> None:
        """Let go of a key and never use its slot again; nothing happens if somebody has let go of it before."""
        self.counters.corrupt += 1
        if key in self._slots:
            self._forget(key)
            self._evictor.capacity -= 1

    def _begin_read(self, key: bytes) -> tuple[int, bytes] | None:
        """Slot and checksum of a key, which stays in its slot until :meth:`_end_read`; None, and a miss, if not held."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is None:
                self.counters.misses += 1
                return None
            self._readers[key] = self._readers.get(key, 0) + 1
            return slot, self._checksums[key]

    def _end_read(self, key: bytes) -> None:
        """One reader is done; under the lock."""
        self._readers[key] -= 1
        if not self._readers[key]:
            del self._readers[key]

    def _count_read(self, seconds: float) -> None:
        self.counters.hits += 1
        self.counters.read_bytes += self.block_bytes
        self.counters.read_s += seconds

    def _count_write(self, seconds: float) -> None:
        self.counters.stored += 1
        self.counters.written_bytes += self.block_bytes
        self.counters.written_s += seconds

    def _clear(self) -> None:
        """Hold nothing and take nothing any more; under the lock."""
        self._slots.clear()
        self._checksums.clear()
        self._free.clear()
        self._evictor = Evictor(0, "lru")
