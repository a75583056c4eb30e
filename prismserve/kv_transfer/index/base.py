"""The interface of the index: a registry of workers and a global map from keys to their holders.

Keys are 32-byte digests; block keys and image-embedding keys share one space. An entry says that a worker, under its
current epoch, holds a key in a tier (:class:`~prismserve.core.types.Tier`: device, host or disk); it may hold one key in
several. ``announce`` inserts and removes entries, ``follow`` subscribes a
:class:`~prismserve.kv_transfer.index.mirror.Mirror`, and the mirror matches the longest prefix over holders
(``longest``) or over holders and tiers (``match``) without a call to the index. Every call has a deadline
(``IndexConfig.call_timeout_s``) and raises :class:`~prismserve.core.errors.IndexUnavailableError` when the index
cannot answer.

Epochs
    ``register`` hands out epochs that grow over the cluster's life. A worker that was silent for longer than its
    lease (stopped, swapped out, cut off from its own clock) gets a new epoch when it registers again, and so does
    one that was dropped: everything it did under the old epoch is fenced. A worker that kept calling all the while
    gets its old epoch back, because then it was the index that lost its state (restart, flush, pause, a jump of the
    server's wall clock) and nothing the worker did in between is in doubt. Silence is measured by the worker's
    monotonic clock.

    A new epoch is larger than the shared counter, than every epoch this process has seen and than its wall clock in
    milliseconds; heartbeats carry the largest epoch seen back to a counter that was lost. The wall clock only ever
    raises epochs: set back, it contributes nothing.

Loss
    ``heartbeat`` and ``announce`` return False when the registration is gone: the owner registers again and
    announces everything it holds with ``replace=True``. After any failed announcement the owner does the same,
    since it cannot know what arrived. :class:`~prismserve.kv_transfer.index.lease.WorkerLease` does all this.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

from prismserve.core.errors import ConfigurationError
from prismserve.core.hashing import DIGEST_BYTES
from prismserve.core.types import Tier

if TYPE_CHECKING:
    import asyncio

    from prismserve.core.types import WorkerInfo, WorkerState
    from prismserve.kv_transfer.index.mirror import Mirror

EPOCH_MAX: Final = 2**52
_WORKER_ID = re.compile(r"[A-Za-z0-9._:@-]{1,128}")
_CLUSTER_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class KVIndex(Protocol):
    """What every implementation of the index does. All methods are coroutine-safe on one event loop."""

    async def register(self, info: WorkerInfo) -> int:
        """Enter a worker and return its epoch; see the module's notes for when an epoch is given back.

        Args:
            info: ``info.epoch`` is the largest epoch the caller knows of for this worker, 0 if none.

        Raises:
            ConfigurationError: the worker id or another field cannot be stored.
            IndexUnavailableError: the index cannot be reached.
        """
        ...

    async def heartbeat(self, worker_id: str, epoch: int, state: WorkerState) -> bool:
        """Renew the lease and publish the state; False means register and announce again."""
        ...

    async def deregister(self, worker_id: str, epoch: int) -> None:
        """Leave in good order: the registration of this epoch and its entries end now."""
        ...

    async def drop_worker(self, worker_id: str, epoch: int | None = None) -> None:
        """Declare a worker dead: its entries end and the epoch (None: its current one) is never given back."""
        ...

    async def workers(self) -> list[WorkerInfo]:
        """The registered workers whose lease runs, by worker id; ``epoch`` and ``state`` are current."""
        ...

    async def announce(
        self,
        worker_id: str,
        epoch: int,
        added: Sequence[bytes],
        removed: Sequence[bytes] = (),
        *,
        tier: Tier = Tier.DEVICE,
        replace: bool = False,
    ) -> bool:
        """Say which keys a worker gained and lost in one tier.

        Calls for one worker must not overlap: their order counts. A block that moves between tiers is added to the
        one before it is removed from the other, so that it is never missing.

        Args:
            worker_id: who announces.
            epoch: the epoch its registration returned.
            added: 32-byte keys it holds now; a key in both sequences counts as removed. Those that follow each other
                in a chain should do so here: mirrors then find chains at once.
            removed: 32-byte keys it no longer holds.
            tier: where it holds, or held, these keys; entries in other tiers stay.
            replace: forget every earlier entry of this worker first, in all tiers.

        Returns:
            False when this registration is gone or fenced; followers ignore such announcements.
        """
        ...

    async def follow(self, mirror: Mirror, stop: asyncio.Event) -> None:
        """Keep ``mirror`` up to date until ``stop`` is set: a snapshot, then events, then again after any loss.

        Survives every failure of the index: it reconnects with backoff (50 ms to 1 s), and takes a new snapshot
        when events were trimmed before it read them or the index lost its state. Meanwhile the mirror keeps what it
        knew. ``mirror.synced`` tells whether a snapshot is in place and the connection is up.
        """
        ...

    async def close(self) -> None:
        """Release connections; registrations are left to ``deregister`` or to their lease."""
        ...


def check_worker_id(worker_id: str) -> None:
    """Refuse an id that cannot be part of a key name."""
    if not _WORKER_ID.fullmatch(worker_id):
        message = f"worker_id {worker_id[:140]!r} must be 1 to 128 characters out of A-Z a-z 0-9 . _ : @ -"
        raise ConfigurationError(message, field="worker_id")


def check_cluster(cluster: str) -> None:
    """Refuse a cluster name that cannot be part of a key name."""
    if not _CLUSTER_ID.fullmatch(cluster):
        message = f"cluster {cluster[:80]!r} must be 1 to 64 characters out of A-Z a-z 0-9 . _ -"
        raise ConfigurationError(message, field="cluster")


def check_epoch(epoch: int) -> None:
    """Refuse an epoch that no registration can have handed out."""
    if not 0 <= epoch <= EPOCH_MAX:
        message = f"epoch {epoch} must be between 0 and {EPOCH_MAX}"
        raise ConfigurationError(message, field="epoch")


def check_keys(keys: Sequence[bytes]) -> None:
    """Refuse keys that are not 32-byte digests."""
    for nbytes in set(map(len, keys)):
        if nbytes != DIGEST_BYTES:
            message = f"an index key has {nbytes} bytes, it must have {DIGEST_BYTES}"
            raise ConfigurationError(message, field="added")
