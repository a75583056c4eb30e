"""Leases on landing pages: every one ends, and pages are not reused while their old sender may still write.

Life of a lease::

    active --commit done, refused, or sender's END--> free
    active --cancel or ttl--> quarantined --sender's END, or 2 x ttl after the grant--> free

Why twice: the sender stops writing ``ttl`` after it *received* the reservation, by its own monotonic clock. It
received it within one ttl of the grant, or it was already dead to us; so after two ttl it has stopped, unless its
process was suspended in the middle of a copy. Such a late write still hits landing memory only, never a KV pool, and
whatever it damages there fails its checksum.
"""

from __future__ import annotations

import enum
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from prismserve.core.errors import LeaseExpiredError, OverloadedError
from prismserve.core.types import Extent

_LEASE_BITS = 63
_REMEMBERED = 4096


class LeaseState(enum.Enum):
    """Where a lease stands."""

    ACTIVE = "active"
    QUARANTINED = "quarantined"


@dataclass(slots=True)
class Lease:
    """One grant; times are seconds of the monotonic clock of whoever made it."""

    lease_id: int
    extent: Extent
    expires_s: float
    free_s: float
    state: LeaseState = LeaseState.ACTIVE


class LeaseTable:
    """The leases of one receiver. Not thread-safe; the clock is passed in.

    Args:
        free: called once for each lease, when its pages may be reused.
        limit: most leases open or quarantined at one time.
    """

    def __init__(self, free: Callable[[Extent], None], limit: int) -> None:
        self._free = free
        self._limit = limit
        self._leases: dict[int, Lease] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """Leases that hold pages."""
        return len(self._leases)

    @property
    def quarantined(self) -> int:
        """Leases that have ended and still hold pages."""
        return sum(lease.state is LeaseState.QUARANTINED for lease in self._leases.values())

    def check_room(self) -> None:
        """OverloadedError if one more lease would be too many."""
        if len(self._leases) >= self._limit:
            message = f"{self._limit} transfer leases are open; try again when one has ended"
            raise OverloadedError(message)

    def grant(self, extent: Extent, ttl_s: float, now_s: float) -> Lease:
        """Open a lease under an unguessable id."""
        self.check_room()
        lease_id = secrets.randbits(_LEASE_BITS)
        while lease_id in self._leases or lease_id in self._ended:
            lease_id = secrets.randbits(_LEASE_BITS)
        lease = Lease(lease_id, extent, now_s + ttl_s, now_s + 2 * ttl_s)
        self._leases[lease_id] = lease
        return lease

    def active(self, lease_id: int, generation: int) -> Lease:
        """The active lease of this id and generation; LeaseExpiredError otherwise."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.state is not LeaseState.ACTIVE or lease.extent.generation != generation:
            message = "the lease has ended, or was never granted under this generation"
            raise LeaseExpiredError(message)
        return lease

    def matches(self, lease_id: int, generation: int) -> bool:
        """Whether the lease holds pages, active or quarantined, under this generation."""
        lease = self._leases.get(lease_id)
        return lease is not None and lease.extent.generation == generation

    def ended(self, lease_id: int) -> bool:
        """Whether the lease is quarantined or ended not long ago (as opposed to never granted)."""
        lease = self._leases.get(lease_id)
        return lease_id in self._ended if lease is None else lease.state is LeaseState.QUARANTINED

    def finish(self, lease_id: int) -> None:
        """Free at once: the sender is known to have stopped. Unknown ids are ignored, so it may be repeated."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        self._ended[lease_id] = None
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        self._free(lease.extent)

    def quarantine(self, lease_id: int) -> bool:
        """End an active lease whose sender may still be writing; False if it is not active."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.state is not LeaseState.ACTIVE:
            return False
        lease.state = LeaseState.QUARANTINED
        return True

    def expire(self, now_s: float) -> list[int]:
        """Quarantine what has run out, free what has run out twice; the ids that ended now."""
        expired = [
            lease.lease_id
            for lease in self._leases.values()
            if lease.state is LeaseState.ACTIVE and lease.expires_s <= now_s
        ]
        for lease_id in expired:
            self.quarantine(lease_id)
        for lease in list(self._leases.values()):
            if lease.state is LeaseState.QUARANTINED and lease.free_s <= now_s:
                self.finish(lease.lease_id)
        return expired

    def next_deadline_s(self) -> float | None:
        """When :meth:`expire` has something to do next; None if never."""
        return min(
            (lease.expires_s if lease.state is LeaseState.ACTIVE else lease.free_s for lease in self._leases.values()),
            default=None,
        )
