"""The memory of one worker that peers write into: anonymous shared memory that cannot outlive its processes.

The arena is a ``memfd``: it never has a name in ``/dev/shm``, so nothing remains after a crash or SIGKILL, and the
size limit of a container's ``/dev/shm`` does not apply. A peer of the same user on the same node opens it through
``/proc/<pid>/fd/<n>`` and makes sure by device, inode, owner, size and seals that it is the file the registry
described; the seals stop either side from truncating memory that the other has mapped.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import threading
from typing import TYPE_CHECKING

import torch

from prismserve.core.config import FrozenConfig, NonNegativeInt, PositiveInt
from prismserve.core.errors import ConfigurationError, TransferError, TransportError
from prismserve.kv_transfer.pages import PageAllocator

if TYPE_CHECKING:
    from prismserve.core.types import Extent
    from prismserve.kv_transfer.config import TransferConfig

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_OWNER_ONLY = 0o600


class ArenaIdentity(FrozenConfig):
    """How a peer on the same node finds and recognises an arena.

    Attributes:
        pid: process that holds the file open.
        fd: its descriptor there.
        device: ``st_dev`` of the file.
        inode: ``st_ino`` of the file.
        nbytes: size.
        landing_bytes: leading part that peers may write to.
    """

    pid: PositiveInt
    fd: NonNegativeInt
    device: NonNegativeInt
    inode: NonNegativeInt
    nbytes: PositiveInt
    landing_bytes: PositiveInt


class Arena:
    """Landing pages (leased to peers) followed by staging pages (this worker's outgoing writes). Thread-safe.

    Attributes:
        page_bytes: size of a page.
        nbytes: of all pages.
        landing_bytes: of those that peers may write to.
        probe_area: (offset, bytes) of the last of these, which are never leased and hold nothing.

    Raises:
        ConfigurationError: the memory cannot be had.
    """

    def __init__(self, config: TransferConfig) -> None:
        self.page_bytes = config.page_bytes
        self.nbytes = (config.landing_pages + config.staging_pages) * config.page_bytes
        self.landing_bytes = config.landing_pages * config.page_bytes
        self._fd, memory = _create(self.nbytes)
        self._memory: torch.Tensor | None = memory
        self._lock = threading.Lock()
        generations = itertools.count(1)
        leased_pages = config.landing_pages - config.probe_pages
        self.probe_area = (leased_pages * config.page_bytes, config.probe_pages * config.page_bytes)
        self._landing = PageAllocator(0, leased_pages, generations.__next__)
        self._staging = PageAllocator(config.landing_pages, config.staging_pages, generations.__next__)

    @property
    def memory(self) -> torch.Tensor:
        """All of it: uint8 [nbytes]. TransferError once closed."""
        if self._memory is None:
            message = "the arena is closed"
            raise TransferError(message)
        return self._memory

    @property
    def used_pages(self) -> int:
        """Landing pages under a lease or in quarantine."""
        with self._lock:
            return self._landing.used_pages

    @property
    def used_staging_pages(self) -> int:
        """Staging pages under a write."""
        with self._lock:
            return self._staging.used_pages

    def allocate(self, nbytes: int) -> Extent:
        """Take landing pages for ``nbytes`` bytes; OverloadedError if full, TransferError if it can never fit."""
        return self._allocate(self._landing, nbytes)

    def allocate_staging(self, nbytes: int) -> Extent:
        """Take staging pages; errors as :meth:`allocate`."""
        return self._allocate(self._staging, nbytes)

    def stage(self, nbytes: int) -> tuple[Extent, torch.Tensor]:
        """Take staging pages, and the first ``nbytes`` bytes of them as uint8 [nbytes]; errors as :meth:`allocate`."""
        extent = self._allocate(self._staging, nbytes)
        start = extent.first_page * self.page_bytes
        return extent, self.memory[start : start + nbytes]

    def _allocate(self, region: PageAllocator, nbytes: int) -> Extent:
        with self._lock:
            return region.allocate(max(1, -(-nbytes // self.page_bytes)))

    def view(self, extent: Extent, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes [offset, offset + nbytes) of a live extent as uint8 [nbytes], shared, not copied.

        Raises:
            LeaseExpiredError: the extent is not live.
            TransferError: the range leaves the extent.
        """
        with self._lock:
            self._region(extent).check_live(extent)
        if offset < 0 or nbytes < 0 or offset + nbytes > extent.pages * self.page_bytes:
            message = f"bytes {offset} to {offset + nbytes} leave an extent of {extent.pages * self.page_bytes} bytes"
            raise TransferError(message)
        start = extent.first_page * self.page_bytes + offset
        return self.memory[start : start + nbytes]

    def free(self, extent: Extent) -> None:
        """Give an extent back; LeaseExpiredError if it is not live."""
        with self._lock:
            self._region(extent).free(extent)

    def _region(self, extent: Extent) -> PageAllocator:
        return self._landing if self._landing.owns(extent) else self._staging

    def identity(self) -> ArenaIdentity:
        """What a peer on this node needs to map the arena."""
        status = os.fstat(self._fd)
        return ArenaIdentity(
            pid=os.getpid(),
            fd=self._fd,
            device=status.st_dev,
            inode=status.st_ino,
            nbytes=self.nbytes,
            landing_bytes=self.landing_bytes,
        )

    def close(self) -> None:
        """Let go of the memory; it is unmapped when the last view of it is gone. May be called twice."""
        if self._memory is not None:
            self._memory = None
            os.close(self._fd)


def map_peer(identity: ArenaIdentity) -> torch.Tensor:
    """Map a peer's arena: uint8 [nbytes], shared with the peer, unmapped when the tensor is gone.

    Raises:
        TransportError: the peer is gone, belongs to another user, or the file is not the one described.
    """
    path = f"/proc/{identity.pid}/fd/{identity.fd}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        message = f"the arena of process {identity.pid} cannot be opened: {error.strerror}"
        raise TransportError(message) from error
    try:
        status = os.fstat(fd)
        found = (status.st_dev, status.st_ino, status.st_size, status.st_uid)
        wanted = (identity.device, identity.inode, identity.nbytes, os.getuid())
        if found != wanted or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            message = f"descriptor {identity.fd} of process {identity.pid} is not the arena its endpoint describes"
            raise TransportError(message)
        return _map(fd, identity.nbytes)
    except OSError as error:
        message = f"the arena of process {identity.pid} cannot be mapped: {error.strerror}"
        raise TransportError(message) from error
    finally:
        os.close(fd)


def _create(nbytes: int) -> tuple[int, torch.Tensor]:
    fd = -1
    try:
        fd = os.memfd_create("prismserve-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(fd, _OWNER_ONLY)
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd, _map(fd, nbytes)
    except (OSError, OverflowError) as error:
        if fd >= 0:
            os.close(fd)
        message = f"transfer.arena_bytes: {nbytes} bytes of shared memory cannot be had: {error}"
        raise ConfigurationError(message, field="transfer.arena_bytes") from error


def _map(fd: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
