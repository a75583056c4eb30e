"""The tiers of one worker together: blocks sink from the device to host memory to the file, and come back on demand.

One thread copies what the device has published into the host tier, and what the host tier evicts into the file. It
never stops the engine: it copies a block without holding it and then asks whether the block was still the same, which a
full, published block is unless it was evicted meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

import torch

from prismserve.core.cores import visible_cores
from prismserve.kv_transfer.tiers.base import Outcome
from prismserve.kv_transfer.tiers.disk import DiskTier
from prismserve.kv_transfer.tiers.host import HostTier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from prismserve.kv_transfer.tiers.base import BlockTier
    from prismserve.kv_transfer.tiers.config import TierConfig
    from prismserve.kv_transfer.tiers.eviction import Label

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 5.0
_THREAD_BYTES_MIN = 1 << 20
"""Waking another thread pays from about this many bytes of host memory on."""


class BlockSource(Protocol):
    """The device's side: full, published blocks by key. Called from the store's thread."""

    def copy_block(self, key: bytes, target: torch.Tensor) -> Label | None:
        """Copy a block into ``target`` (uint8 [block_bytes], CPU) and say whose it is; None if it is not held.

        None as well where the block was given to somebody else while it was copied.
        """
        ...


@dataclass(slots=True)
class StoreCounters:
    """What the store did beside its tiers' own counts.

    Attributes:
        overflowed: blocks not kept because the queue was full.
        vanished: blocks that left the device before they were copied.
        demoted: blocks that went from host memory to the file.
        promoted: blocks that went from the file to host memory.
    """

    overflowed: int = 0
    vanished: int = 0
    demoted: int = 0
    promoted: int = 0


class TierStore:
    """Blocks of one worker below its device.

    Args:
        config: sizes, folder, policy.
        block_bytes: size of every block.
        identity: 32 bytes over everything that makes blocks interchangeable.
        source: the device's side.
        on_change: called with (tier name, gained, lost) after a tier's keys changed, in the store's thread; must return
            at once.

    Raises:
        ConfigurationError: the memory or the folder cannot be used.
    """

    def __init__(
        self,
        config: TierConfig,
        block_bytes: int,
        identity: bytes,
        source: BlockSource,
        on_change: Callable[[str, Sequence[bytes], Sequence[bytes]], None] | None = None,
    ) -> None:
        self.config = config
        self.block_bytes = block_bytes
        self.counters = StoreCounters()
        self.host = HostTier(config, block_bytes, self._demote)
        self.disk = DiskTier(config, block_bytes, identity) if config.disk_path is not None else None
        self._source = source
        self._on_change = on_change
        self._waiting: queue.Queue[bytes | None] = queue.Queue(config.queue_blocks_max)
        self._stopping = threading.Event()
        self._cores = visible_cores()
        self._pool = ThreadPoolExecutor(config.io_threads, thread_name_prefix="tier-read")
        self._thread = threading.Thread(target=self._run, name="tiers", daemon=True)
        self._thread.start()

    @property
    def tiers(self) -> tuple[BlockTier, ...]:
        """The tiers that are on, fastest first."""
        return tuple(tier for tier in (self.host, self.disk) if tier is not None and tier.enabled)

    def offer(self, keys: Iterable[bytes]) -> None:
        """The device holds these blocks now, parents before children; they are copied in the background."""
        if not self.tiers:
            return
        for key in keys:
            try:
                self._waiting.put_nowait(key)
            except queue.Full:
                self.counters.overflowed += 1

    def tier_of(self, key: bytes) -> BlockTier | None:
        """The fastest tier that holds a block."""
        return next((tier for tier in self.tiers if key in tier), None)

    def held_run(self, keys: Sequence[bytes]) -> list[BlockTier]:
        """For the longest leading run of ``keys`` that is held, the fastest tier of each."""
        found = (self.tier_of(key) for key in keys)
        return list(takewhile(lambda tier: tier is not None, found))  # type: ignore[arg-type] # takewhile narrows nothing

    def read_run(self, keys: Sequence[bytes], targets: Sequence[torch.Tensor]) -> int:
        """Copy a run of blocks into ``targets``; as many leading ones as were found intact.

        Args:
            keys: first to last.
            targets: one uint8 [block_bytes] on the CPU each; those beyond the run that was found hold garbage.

        Returns:
            Blocks read. What was read from the file moves up into host memory.
        """
        sources: list[BlockTier | None] = [None] * len(keys)
        waiting = deque(range(len(keys)))

        def read() -> None:
            while waiting:
                try:
                    index = waiting.popleft()
                except IndexError:
                    return
                sources[index] = self._read(keys[index], targets[index])
                if sources[index] is None:
                    # Nothing behind it is of use.
                    waiting.clear()

        others = [self._pool.submit(read) for _ in range(self._threads_for(keys) - 1)]
        read()
        for other in others:
            # One that waits for a thread has nothing left to do.
            if not other.cancel():
                other.result()
        found = sum(1 for _ in takewhile(lambda source: source is not None, sources))
        for tier in self.tiers:
            tier.touch(keys[:found])
        promoted = [
            key for key, source in zip(keys, sources, strict=True) if source is not None and source is self.disk
        ]
        for key in promoted:
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait(key)
        return found

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything offered has been dealt with; False if that took longer."""
        deadline = time.monotonic() + timeout_s
        while self._waiting.unfinished_tasks:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def close(self) -> None:
        """End the threads and close the tiers; may be called twice."""
        self._stopping.set()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(_STOP_TIMEOUT_S)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.host.close()
        if self.disk is not None:
            self.disk.close()

    def _threads_for(self, keys: Sequence[bytes]) -> int:
        """Threads that read a run, the caller's among them: a drive wants many reads at once, memory as many as cores."""
        if self.disk is not None and any(key not in self.host for key in keys):
            return min(self.config.io_threads, len(keys))
        return max(1, min(self.config.io_threads, self._cores, len(keys) * self.block_bytes // _THREAD_BYTES_MIN))

    def _read(self, key: bytes, target: torch.Tensor) -> BlockTier | None:
        """Read a block from the fastest tier that has it intact; that tier, or None."""
        for tier in self.tiers:
            outcome = tier.get(key, target)
            if outcome is Outcome.FOUND:
                return tier
            if outcome in (Outcome.CORRUPT, Outcome.FAILED):
                logger.warning("a block in the %s tier was %s and is dropped", tier.name, outcome.value)
                self._changed(tier.name, (), (key,))
        return None

    # ---- the store's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        scratch = torch.empty(self.block_bytes, dtype=torch.uint8)
        while not self._stopping.is_set():
            key = self._waiting.get()
            try:
                if key is not None:
                    self._store(key, scratch)
            except Exception:
                logger.exception("a block could not be kept")
            finally:
                self._waiting.task_done()

    def _store(self, key: bytes, scratch: torch.Tensor) -> None:
        if key in self.host:
            self.host.touch((key,))
            return
        label = self._from_disk(key, scratch)
        if label is None:
            label = self._source.copy_block(key, scratch)
            if label is None:
                self.counters.vanished += 1
                return
        if self.host.enabled:
            lost = self.host.put(key, scratch, label)
            self._changed("host", (key,) if key in self.host else (), lost)
        elif self.disk is not None and key not in self.disk:
            self._to_disk(key, scratch, label)

    def _from_disk(self, key: bytes, scratch: torch.Tensor) -> Label | None:
        """A block that was restored from the file moves up, read once more rather than held for the request's time."""
        if self.disk is None or not self.host.enabled:
            return None
        label = self.disk.label(key)
        if label is None or self.disk.get(key, scratch) is not Outcome.FOUND:
            return None
        self.counters.promoted += 1
        return label

    def _demote(self, key: bytes, block: torch.Tensor, label: Label) -> None:
        if self.disk is not None and self.disk.enabled and key not in self.disk:
            self._to_disk(key, block, label)

    def _to_disk(self, key: bytes, block: torch.Tensor, label: Label) -> None:
        assert self.disk is not None  # noqa: S101 - both callers have asked
        lost = self.disk.put(key, block, label)
        if key in self.disk:
            self.counters.demoted += 1
        self._changed("disk", (key,) if key in self.disk else (), lost)

    def _changed(self, tier: str, gained: Sequence[bytes], lost: Sequence[bytes]) -> None:
        if self._on_change is not None and (gained or lost):
            self._on_change(tier, gained, lost)
