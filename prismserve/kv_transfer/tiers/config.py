"""Settings of the tiers of one worker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prismserve.core.config import FrozenConfig, NonNegativeInt, PositiveInt, PositiveSeconds

_MIB = 1 << 20


class TierConfig(FrozenConfig):
    """Where blocks go that the device has no room for, and when they come back.

    Attributes:
        host_bytes: host memory for blocks, committed as it is used; 0 turns the tier off. Other workers reach it
            through this worker.
        disk_path: folder of the file tier, on a local NVMe drive if possible; unset: no file tier. Each worker of a node
            takes a file of its own in it, and a restarted worker finds its blocks again.
        disk_bytes: size of each worker's file; it is reserved when the worker starts.
        policy: ``lru`` evicts what was not used for longest; ``gdsf`` also keeps what was used often and what is dear
            to compute again.
        images: embeddings of images are kept too, each in blocks of its own.
        queue_blocks_max: blocks that wait to be copied to a tier; further ones are not kept.
        restore_blocks_min: shortest run of blocks that is worth restoring.
        restore_confidence: share of restores that shall be faster than computing, by how far predictions of both were off
            lately; 0.5 goes by the typical error, 1 by the worst.
        restore_timeout_s: how long a request waits for its blocks to come back before they are computed instead.
        io_threads: reads and writes of the file at one time.
        disk_errors_max: failed reads or writes in a row that turn the file tier off.
    """

    host_bytes: NonNegativeInt = 256 * _MIB
    disk_path: str | None = None
    disk_bytes: PositiveInt = 4096 * _MIB
    policy: Literal["lru", "gdsf"] = "lru"
    images: bool = True
    queue_blocks_max: PositiveInt = 4096
    restore_blocks_min: PositiveInt = 2
    restore_confidence: float = Field(default=0.95, ge=0.5, le=1.0)
    restore_timeout_s: PositiveSeconds = 5.0
    io_threads: int = Field(default=4, ge=1, le=64)
    disk_errors_max: PositiveInt = 3
