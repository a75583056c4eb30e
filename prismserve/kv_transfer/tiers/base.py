"""What a tier does, and what it counts."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from prismserve.kv_transfer.tiers.eviction import Label

ALIGNMENT: Final = 4096
"""Blocks lie at multiples of this many bytes, in memory and in files: what direct I/O asks for."""


class Outcome(enum.Enum):
    """What came of reading a block."""

    FOUND = "found"
    MISSING = "missing"
    CORRUPT = "corrupt"
    FAILED = "failed"


@dataclass(slots=True)
class TierCounters:
    """Totals of one tier since it was opened."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    evicted: int = 0
    corrupt: int = 0
    errors: int = 0
    read_bytes: int = 0
    read_s: float = 0.0
    written_bytes: int = 0
    written_s: float = 0.0

    @property
    def read_bytes_per_s(self) -> float:
        """Measured rate of reading; 0 before the first read."""
        return self.read_bytes / self.read_s if self.read_s else 0.0


class BlockTier(Protocol):
    """Blocks by key. Thread-safe.

    Attributes:
        name: ``host`` or ``disk``.
        block_bytes: every block is this long.
        counters: totals.
        enabled: False once the tier gave itself up; it then holds nothing and takes nothing.
    """

    name: ClassVar[str]
    block_bytes: int
    counters: TierCounters

    @property
    def enabled(self) -> bool:
        """See above."""
        ...

    def __len__(self) -> int:
        """Blocks held."""
        ...

    def __contains__(self, key: bytes) -> bool:
        """Whether a block is held; does not count as use."""
        ...

    def keys(self) -> list[bytes]:
        """Keys held."""
        ...

    def label(self, key: bytes) -> Label | None:
        """What was said of a block when it was stored."""
        ...

    def touch(self, run: Sequence[bytes]) -> None:
        """A run of blocks was used."""
        ...

    def put(self, key: bytes, block: torch.Tensor, label: Label) -> list[bytes]:
        """Store a block, evicting others if the tier is full.

        Args:
            key: 32 bytes; a key that is held is left as it is.
            block: uint8 [block_bytes] on the CPU.
            label: owner, share and cost.

        Returns:
            Keys that left for it. The block itself is not held if writing failed or everything is in use.
        """
        ...

    def get(self, key: bytes, target: torch.Tensor) -> Outcome:
        """Copy a block into ``target`` (uint8 [block_bytes]) and verify it; a corrupt one is gone afterwards.

        ``target`` holds garbage unless the outcome is FOUND.
        """
        ...

    def drop(self, key: bytes) -> None:
        """Forget a block; nothing happens if it is not held."""
        ...

    def close(self) -> None:
        """Release what the tier holds; may be called twice."""
        ...


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
