"""What one process remembers of its own registrations: which epoch may be asked back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prismserve.core.types import WorkerInfo


@dataclass(slots=True)
class Claim:
    """One registration this process made.

    Attributes:
        info: the record as last stored.
        called_s: when a call of the owner last began or ended, by its monotonic clock, answered or not.
        silent: whether more than a lease once passed between two such moments: it was stopped, or did not call.
    """

    info: WorkerInfo
    called_s: float
    silent: bool = False


class Claims:
    """Registrations of this process by worker id, and the largest epoch it has seen.

    Args:
        lease_ttl_s: silence longer than this forfeits the epoch.
        clock: monotonic seconds.
        wall_clock: seconds since 1970; only ever raises the floor of new epochs.
    """

    def __init__(
        self,
        lease_ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._ttl_s = lease_ttl_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._claims: dict[str, Claim] = {}
        self.epoch_seen = 0

    def saw(self, epoch: int) -> None:
        """Note an epoch of any worker."""
        self.epoch_seen = max(self.epoch_seen, epoch)

    def floor(self, info: WorkerInfo) -> int:
        """What a new epoch must exceed."""
        return max(self.epoch_seen, info.epoch, int(self._wall_clock() * 1000))

    def hold(self, info: WorkerInfo) -> None:
        """Remember a registration that was just made."""
        self.saw(info.epoch)
        self._claims[info.worker_id] = Claim(info, self._clock())

    def update(self, info: WorkerInfo) -> None:
        """Remember the record as it is stored now."""
        claim = self._claims.get(info.worker_id)
        if claim is not None and claim.info.epoch == info.epoch:
            claim.info = info

    def touch(self, worker_id: str, epoch: int) -> WorkerInfo | None:
        """Note a sign of life of the owner; the record as last stored, or None when this process holds no such claim."""
        claim = self._claims.get(worker_id)
        if claim is None or claim.info.epoch != epoch:
            return None
        now = self._clock()
        if now - claim.called_s > self._ttl_s:
            claim.silent = True
        claim.called_s = now
        return claim.info

    @contextmanager
    def calling(self, worker_id: str, epoch: int) -> Iterator[WorkerInfo | None]:
        """Wrap a call of the owner: waiting for an index that does not answer is no silence."""
        info = self.touch(worker_id, epoch)
        try:
            yield info
        finally:
            self.touch(worker_id, epoch)

    def renewed(self, worker_id: str, epoch: int) -> None:
        """The lease was found alive: earlier silence has done no harm."""
        claim = self._claims.get(worker_id)
        if claim is not None and claim.info.epoch == epoch:
            claim.silent = False

    def reclaimable(self, worker_id: str) -> int | None:
        """The epoch to ask back, if the owner never fell silent under it."""
        claim = self._claims.get(worker_id)
        if claim is None:
            return None
        self.touch(worker_id, claim.info.epoch)
        return None if claim.silent else claim.info.epoch

    def release(self, worker_id: str) -> None:
        """Forget a registration that ended on purpose."""
        self._claims.pop(worker_id, None)
