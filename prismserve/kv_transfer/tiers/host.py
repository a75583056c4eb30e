"""Blocks in host memory: one anonymous mapping cut into equal slots, committed page by page as they are used."""

from __future__ import annotations

import mmap
import threading
import time
from typing import TYPE_CHECKING, ClassVar

import torch

from prismserve.core.errors import ConfigurationError
from prismserve.kv_transfer.tiers.base import Outcome, TierCounters, aligned, copy_hashed
from prismserve.kv_transfer.tiers.eviction import Evictor, Label

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prismserve.kv_transfer.tiers.config import TierConfig


class HostTier:
    """See :class:`prismserve.kv_transfer.tiers.base.BlockTier`.

    A block that is being read keeps its slot until the reader is done; one that fails its checksum takes its slot out
    of service, since memory that flipped a bit once may do so again.

    Args:
        config: ``host_bytes`` and ``policy``.
        block_bytes: size of every block.
        on_evict: called with (key, block, label) before a block's slot is used again, in the thread that stores.

    Raises:
        ConfigurationError: the memory cannot be mapped.
    """

    name: ClassVar[str] = "host"

    def __init__(
        self,
        config: TierConfig,
        block_bytes: int,
        on_evict: Callable[[bytes, torch.Tensor, Label], None] | None = None,
    ) -> None:
        self.block_bytes = block_bytes
        self.counters = TierCounters()
        self._on_evict = on_evict
        self._slot_bytes = aligned(block_bytes)
        slots = config.host_bytes // self._slot_bytes
        self._evictor = Evictor(slots, config.policy)
        self._lock = threading.Lock()
        self._slots: dict[bytes, int] = {}
        self._checksums: dict[bytes, bytes] = {}
        self._readers: dict[bytes, int] = {}
        self._memory = _map(slots * self._slot_bytes) if slots else torch.empty(0, dtype=torch.uint8)
        self._free = list(range(slots - 1, -1, -1))

    @property
    def enabled(self) -> bool:
        """Whether it has any slot."""
        return self._evictor.capacity > 0

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        """Whether a block is held."""
        return key in self._slots

    def keys(self) -> list[bytes]:
        """Keys held."""
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

    def put(self, key: bytes, block: torch.Tensor, label: Label) -> list[bytes]:
        """Store a block; see the protocol. Only one thread may store at a time."""
        started = time.perf_counter()
        with self._lock:
            if key in self._slots or not self.enabled:
                return []
            victim = self._evictor.victim(label, self._readers)
            leaving = None if victim is None else (victim, self._view(self._slots[victim]), self._evictor.label(victim))
        evicted: list[bytes] = []
        if leaving is not None:
            if self._on_evict is not None:
                self._on_evict(*leaving)
            if not self._evict(leaving[0]):
                return []
            evicted.append(leaving[0])
        with self._lock:
            if not self._free:
                return evicted
            slot = self._free.pop()
        digest = copy_hashed(block, self._view(slot))
        with self._lock:
            self._slots[key] = slot
            self._checksums[key] = digest
            self._evictor.add(key, label)
            self.counters.stored += 1
            self.counters.written_bytes += self.block_bytes
            self.counters.written_s += time.perf_counter() - started
        return evicted

    def get(self, key: bytes, target: torch.Tensor) -> Outcome:
        """Copy a block out; see the protocol."""
        started = time.perf_counter()
        with self._lock:
            slot = self._slots.get(key)
            if slot is None:
                self.counters.misses += 1
                return Outcome.MISSING
            self._readers[key] = self._readers.get(key, 0) + 1
            expected = self._checksums[key]
        found = copy_hashed(self._view(slot), target) == expected
        with self._lock:
            self._readers[key] -= 1
            if not self._readers[key]:
                del self._readers[key]
            if not found:
                self.counters.corrupt += 1
                if key in self._slots:
                    # The slot is not given back: it stays out of service.
                    self._forget(key)
                    self._evictor.capacity -= 1
                return Outcome.CORRUPT
            self.counters.hits += 1
            self.counters.read_bytes += self.block_bytes
            self.counters.read_s += time.perf_counter() - started
            return Outcome.FOUND

    def drop(self, key: bytes) -> None:
        """Forget a block."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is not None and key not in self._readers:
                self._forget(key)
                self._free.append(slot)

    def close(self) -> None:
        """Hold nothing; the memory is unmapped when the last view of it is gone."""
        with self._lock:
            for key in list(self._slots):
                self._forget(key)
            self._free.clear()
            self._evictor.capacity = 0
            self._memory = torch.empty(0, dtype=torch.uint8)

    def _evict(self, key: bytes) -> bool:
        with self._lock:
            slot = self._slots.get(key)
            if slot is None:
                return bool(self._free)
            if key in self._readers:
                return False
            self._forget(key)
            self._free.append(slot)
            self.counters.evicted += 1
            return True

    def _forget(self, key: bytes) -> None:
        if self._slots.pop(key, None) is not None:
            del self._checksums[key]
            self._evictor.remove(key)

    def _view(self, slot: int) -> torch.Tensor:
        start = slot * self._slot_bytes
        return self._memory[start : start + self.block_bytes]


def _map(nbytes: int) -> torch.Tensor:
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError) as error:
        message = f"host_bytes: {nbytes} bytes of host memory cannot be mapped: {error}"
        raise ConfigurationError(message, field="tiers.host_bytes") from error
    return torch.frombuffer(memory, dtype=torch.uint8)
