"""The file of the disk tier: a superblock, a table of headers, and slots of one block each.

::

    0            superblock (4096 bytes): magic, version, slot size, slots, identity, checksum
    4096         header table: 128 bytes a slot, rounded up to 4096
    data_start   slot 0, slot 1, ... each ``aligned(block_bytes)`` long

Integers are little-endian. A header is written after its slot, and both the header and the block have checksums, so a
write that was torn by a crash or a power failure is an empty slot or a block that fails its check, never a wrong one.
The file belongs to one process at a time, by ``flock``. Reads and writes go past the page cache (``O_DIRECT``) where the
file system allows it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import xxhash

from prismserve.core.errors import ConfigurationError
from prismserve.kv_transfer.tiers.base import ALIGNMENT, aligned

if TYPE_CHECKING:
    from pathlib import Path

MAGIC: Final = b"PRISMKV1"
VERSION: Final = 1
FILES_MAX: Final = 64
"""Workers of one node that can share a folder."""
_SUPERBLOCK: Final = struct.Struct("<8sIIQQ32s")
_HEADER: Final = struct.Struct("<32s16s16sQff")
_HEADER_BYTES: Final = 128
_OWNER_ONLY: Final = 0o600


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """What the table says of one slot.

    Attributes:
        key: 32 bytes.
        checksum: 16 bytes over the block.
        owner: 16 bytes, see :class:`prismserve.kv_transfer.tiers.eviction.Label`.
        stamp: grows with use; the order in which blocks leave after a restart.
        share: as in the label.
        cost: as in the label.
    """

    key: bytes
    checksum: bytes
    owner: bytes
    stamp: int
    share: float
    cost: float

    def pack(self) -> bytes:
        """128 bytes with their own checksum."""
        body = _HEADER.pack(self.key, self.checksum, self.owner, self.stamp, self.share, self.cost)
        return (body + xxhash.xxh3_64_digest(body)).ljust(_HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, raw: bytes) -> SlotHeader | None:
        """The header in 128 bytes; None if the slot is empty or the header damaged."""
        body, check = raw[: _HEADER.size], raw[_HEADER.size : _HEADER.size + 8]
        if not any(raw) or xxhash.xxh3_64_digest(body) != check:
            return None
        return cls(*_HEADER.unpack(body))


class SlabFile:
    """One open, locked file. Methods raise OSError where the drive fails.

    Args:
        folder: made if it is missing.
        nbytes: size of the file, reserved at once.
        block_bytes: size of every block.
        identity: 32 bytes over everything that makes blocks interchangeable; a file of another identity is emptied.

    Raises:
        ConfigurationError: the folder cannot be used, or holds as many open files as are allowed.
        OSError: the drive is full or failing.
    """

    def __init__(self, folder: Path, nbytes: int, block_bytes: int, identity: bytes) -> None:
        self.block_bytes = block_bytes
        self.slot_bytes = aligned(block_bytes)
        self.slots = _slots(nbytes, self.slot_bytes)
        if self.slots < 1:
            message = f"disk_bytes: {nbytes} bytes do not hold one block of {block_bytes} bytes"
            raise ConfigurationError(message, field="tiers.disk_bytes")
        self._fd = _open_locked(folder)
        try:
            self._table = _buffer(aligned(self.slots * _HEADER_BYTES))
            self._data_start = ALIGNMENT + len(self._table)
            os.posix_fallocate(self._fd, 0, self._data_start + self.slots * self.slot_bytes)
            self.direct = _go_direct(self._fd)
            self._adopt(identity)
        except BaseException:
            os.close(self._fd)
            raise

    def headers(self) -> dict[int, SlotHeader]:
        """Slots that hold something, as the table says."""
        table = memoryview(self._table)
        found = {}
        for slot in range(self.slots):
            header = SlotHeader.unpack(bytes(table[slot * _HEADER_BYTES : (slot + 1) * _HEADER_BYTES]))
            if header is not None:
                found[slot] = header
        return found

    def scratch(self) -> torch.Tensor:
        """A buffer that direct I/O accepts: uint8 [slot_bytes], aligned, zero."""
        return torch.frombuffer(_buffer(self.slot_bytes), dtype=torch.uint8)

    def fits(self, target: torch.Tensor) -> bool:
        """Whether a slot can be read into uint8 [block_bytes] as it lies, without a buffer of its own."""
        return target.shape[0] == self.slot_bytes and target.data_ptr() % ALIGNMENT == 0 and target.is_contiguous()

    def read(self, slot: int, target: torch.Tensor) -> None:
        """Fill ``target`` (from :meth:`scratch`, or one that :meth:`fits`) with a slot; OSError if the drive gives less."""
        view = target.numpy().data.cast("B")
        at = self._data_start + slot * self.slot_bytes
        done = 0
        while done < self.slot_bytes:
            count = os.preadv(self._fd, [view[done:]], at + done)
            if count == 0:
                raise OSError(errno.EIO, "the file ends inside a slot")
            done += count

    def write(self, slot: int, data: torch.Tensor) -> None:
        """Write a slot from aligned uint8 [slot_bytes]."""
        self._write(data.numpy().data.cast("B"), self._data_start + slot * self.slot_bytes)

    def write_header(self, slot: int, header: SlotHeader | None) -> None:
        """Enter a slot into the table, or empty it; call from one thread at a time."""
        start = slot * _HEADER_BYTES
        raw = bytes(_HEADER_BYTES) if header is None else header.pack()
        table = memoryview(self._table)
        table[start : start + _HEADER_BYTES] = raw
        page = start // ALIGNMENT * ALIGNMENT
        self._write(table[page : page + ALIGNMENT], ALIGNMENT + page)

    def close(self) -> None:
        """Unlock; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _adopt(self, identity: bytes) -> None:
        """Keep the file's content if it is of this identity and shape, else start empty."""
        wanted = _SUPERBLOCK.pack(MAGIC, VERSION, 0, self.slot_bytes, self.slots, identity)
        wanted = (wanted + xxhash.xxh3_64_digest(wanted)).ljust(ALIGNMENT, b"\0")
        page = _buffer(ALIGNMENT)
        os.preadv(self._fd, [page], 0)
        if page[:] == wanted:
            os.preadv(self._fd, [self._table], ALIGNMENT)
            return
        # The table goes first: a superblock must never vouch for headers of another identity.
        self._write(memoryview(self._table), ALIGNMENT)
        page[:] = wanted
        self._write(memoryview(page), 0)

    def _write(self, view: memoryview, at: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], at + done)


def _slots(nbytes: int, slot_bytes: int) -> int:
    """Slots of a file of at most ``nbytes`` bytes, table and superblock included."""
    slots = max(0, nbytes - 2 * ALIGNMENT) // (slot_bytes + _HEADER_BYTES)
    while slots and ALIGNMENT + aligned(slots * _HEADER_BYTES) + slots * slot_bytes > nbytes:
        slots -= 1
    return slots


def _buffer(nbytes: int) -> mmap.mmap:
    """Zeroed memory at a page boundary."""
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _open_locked(folder: Path) -> int:
    """The first file of the folder nobody else has open."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in range(FILES_MAX):
            fd = os.open(folder / f"blocks-{number}.kv", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _OWNER_ONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                continue
            return fd
    except OSError as error:
        message = f"disk_path: the folder {folder} cannot be used: {(error.strerror or str(error)).lower()}"
        raise ConfigurationError(message, field="tiers.disk_path") from None
    message = f"disk_path: all {FILES_MAX} files of {folder} are in use; give these workers another folder"
    raise ConfigurationError(message, field="tiers.disk_path")


def _go_direct(fd: int) -> bool:
    """Turn the page cache off for a file; False where the file system does not allow it."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        return True
    return False
