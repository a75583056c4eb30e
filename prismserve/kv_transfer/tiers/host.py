"""Blocks in host memory: one anonymous mapping cut into equal slots, committed page by page as they are used."""

from __future__ import annotations

import mmap
import time
from typing import TYPE_CHECKING, ClassVar

import torch

from prismserve.core.errors import ConfigurationError
from prismserve.kernels.copy_hashed import copy_hashed
from prismserve.kv_transfer.tiers.base import Outcome, aligned
from prismserve.kv_transfer.tiers.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismserve.kv_transfer.tiers.config import TierConfig
    from prismserve.kv_transfer.tiers.eviction import Label


class HostTier(Slots):
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
        self._on_evict = on_evict
        self._slot_bytes = aligned(block_bytes)
        slots = config.host_bytes // self._slot_bytes
        self._memory = _map(slots * self._slot_bytes) if slots else torch.empty(0, dtype=torch.uint8)
        super().__init__(slots, block_bytes, config.policy)

    @property
    def enabled(self) -> bool:
        """Whether it has any slot."""
        return self._evictor.capacity > 0

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
            self._hold(key, slot, digest, label)
            self._count_write(time.perf_counter() - started)
        return evicted

    def get(self, key: bytes, target: torch.Tensor) -> Outcome:
        """Copy a block out; see the protocol."""
        started = time.perf_counter()
        held = self._begin_read(key)
        if held is None:
            return Outcome.MISSING
        slot, expected = held
        intact = copy_hashed(self._view(slot), target) == expected
        with self._lock:
            self._end_read(key)
            if not intact:
                self._retire(key)
                return Outcome.CORRUPT
            self._count_read(time.perf_counter() - started)
            return Outcome.FOUND

    def drop(self, key: bytes) -> None:
        """Forget a block."""
        with self._lock:
            if key in self._slots and key not in self._readers:
                self._free.append(self._forget(key))

    def close(self) -> None:
        """Hold nothing; the memory is unmapped when the last view of it is gone."""
        with self._lock:
            self._clear()
            self._memory = torch.empty(0, dtype=torch.uint8)

    def _evict(self, key: bytes) -> bool:
        """Give a block's slot back unless it came to be read meanwhile; whether a slot is free now."""
        with self._lock:
            if key in self._slots and key not in self._readers:
                self._free.append(self._forget(key))
                self.counters.evicted += 1
            return bool(self._free)

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
