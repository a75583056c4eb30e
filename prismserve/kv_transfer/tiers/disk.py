"""Blocks in a file on a local drive, found again after a restart."""

from __future__ import annotations

import logging
import queue
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from prismserve.core.errors import ConfigurationError
from prismserve.kernels.copy_hashed import copy_hashed
from prismserve.kv_transfer.tiers.base import Outcome
from prismserve.kv_transfer.tiers.eviction import Label
from prismserve.kv_transfer.tiers.slab_file import SlabFile, SlotHeader
from prismserve.kv_transfer.tiers.slots import Slots

if TYPE_CHECKING:
    import torch

    from prismserve.kv_transfer.tiers.config import TierConfig

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 5.0


class DiskTier(Slots):
    """See :class:`prismserve.kv_transfer.tiers.base.BlockTier`.

    A read or write that fails drops that block. So many failures in a row that the drive must be taken for broken or
    full turn the tier off. A slot whose block failed its checksum is not used again until the next start.

    Args:
        config: ``disk_path`` (set), ``disk_bytes``, ``policy``, ``io_threads``, ``disk_errors_max``.
        block_bytes: size of every block.
        identity: 32 bytes over everything that makes blocks interchangeable (model, layout).

    Raises:
        ConfigurationError: the folder cannot be used.
    """

    name: ClassVar[str] = "disk"

    def __init__(self, config: TierConfig, block_bytes: int, identity: bytes) -> None:
        if config.disk_path is None:
            message = "disk_path must be set for a file tier"
            raise ConfigurationError(message, field="tiers.disk_path")
        self._table_lock = threading.Lock()
        self._failures = 0
        self._failures_max = config.disk_errors_max
        self._file: SlabFile | None = None
        self._retired: SlabFile | None = None
        self._buffers = config.io_threads
        self._scratch: queue.Queue[torch.Tensor] = queue.Queue()
        try:
            file = SlabFile(Path(config.disk_path), config.disk_bytes, block_bytes, identity)
        except OSError as error:
            # A full drive must not keep a worker from serving.
            logger.warning("the disk tier is off: %s", error.strerror or error)
            super().__init__(0, block_bytes, config.policy)
            self.counters.errors += 1
            return
        super().__init__(file.slots, block_bytes, config.policy)
        self._file = file
        for _ in range(config.io_threads):
            self._scratch.put(file.scratch())
        self._recover(file)

    def _recover(self, file: SlabFile) -> None:
        """Take in what an earlier process left, least recently used first."""
        headers = file.headers()
        for slot, header in sorted(headers.items(), key=lambda item: item[1].stamp):
            if header.key in self._slots:
                continue
            self._hold(header.key, slot, header.checksum, Label(header.owner, header.share, header.cost))
        taken = set(self._slots.values())
        self._free = [slot for slot in range(file.slots - 1, -1, -1) if slot not in taken]

    @property
    def enabled(self) -> bool:
        """False once the drive has failed too often, or could not be opened."""
        return self._file is not None

    def put(self, key: bytes, block: torch.Tensor, label: Label) -> list[bytes]:
        """Store a block; see the protocol. Only one thread may store at a time."""
        started = time.perf_counter()
        file, evicted = self._file, []
        with self._lock:
            if file is None or key in self._slots:
                return []
            victim = self._evictor.victim(label, self._readers)
            if victim is not None:
                self._free.append(self._forget(victim))
                self.counters.evicted += 1
                evicted.append(victim)
            if not self._free:
                return evicted
            slot = self._free.pop()
        scratch = self._scratch.get()
        try:
            digest = copy_hashed(block, scratch[: self.block_bytes])
            if evicted:
                # The old header must not vouch for the slot while it is overwritten.
                self._enter(file, slot, None)
            file.write(slot, scratch)
            stamp = time.time_ns()
            self._enter(file, slot, SlotHeader(key, digest, label.owner, stamp, label.share, label.cost))
        except OSError as error:
            with self._lock:
                self._free.append(slot)
            self._failed(error)
            return evicted
        finally:
            self._scratch.put(scratch)
        with self._lock:
            self._failures = 0
            if self._file is not file:
                return evicted
            self._hold(key, slot, digest, label)
            self._count_write(time.perf_counter() - started)
        return evicted

    def get(self, key: bytes, target: torch.Tensor) -> Outcome:
        """Copy a block out; see the protocol. As many threads as ``io_threads`` read at one time."""
        started = time.perf_counter()
        file = self._file
        held = self._begin_read(key)
        if held is None or file is None:
            return Outcome.MISSING
        slot, expected = held
        # Also where it is not read into: as many readers as there are buffers, and :meth:`close` waits for all of them.
        scratch = self._scratch.get()
        failure: OSError | None = None
        intact = False
        try:
            if file.fits(target):
                file.read(slot, target)
                intact = copy_hashed(target, None) == expected
            else:
                file.read(slot, scratch)
                intact = copy_hashed(scratch[: self.block_bytes], target) == expected
        except OSError as error:
            failure = error
        finally:
            self._scratch.put(scratch)
        with self._lock:
            self._end_read(key)
            if intact:
                self._failures = 0
                self._count_read(time.perf_counter() - started)
                return Outcome.FOUND
            if failure is None:
                self._failures = 0
                self._retire(key)
        if failure is not None:
            self.drop(key)
            self._failed(failure)
            return Outcome.FAILED
        self._clear_header(file, slot)
        return Outcome.CORRUPT

    def drop(self, key: bytes) -> None:
        """Forget a block."""
        with self._lock:
            file = self._file
            if key not in self._slots or key in self._readers or file is None:
                return
            slot = self._forget(key)
            self._free.append(slot)
        self._clear_header(file, slot)

    def close(self) -> None:
        """Unlock the file, which keeps its blocks for the next worker."""
        self._give_up()
        file, self._retired = self._retired, None
        if file is None:
            return
        # Every read and write holds a buffer: with all of them here, none is under way on the descriptor.
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        try:
            for _ in range(self._buffers):
                self._scratch.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            logger.warning("the drive of the disk tier does not answer; its file is left open until the process ends")
            return
        file.close()

    def _give_up(self) -> None:
        """Hold and take nothing any more; the file stays open for reads and writes under way."""
        with self._lock:
            self._retired, self._file = self._file or self._retired, None
            self._clear()

    def _clear_header(self, file: SlabFile, slot: int) -> None:
        try:
            self._enter(file, slot, None)
        except OSError as error:
            self._failed(error)

    def _enter(self, file: SlabFile, slot: int, header: SlotHeader | None) -> None:
        with self._table_lock:
            file.write_header(slot, header)

    def _failed(self, error: OSError) -> None:
        with self._lock:
            self.counters.errors += 1
            self._failures += 1
            broken = self._failures >= self._failures_max and self._file is not None
        if broken:
            logger.warning("the disk tier is off after %d failures: %s", self._failures, error.strerror or error)
            self._give_up()
