"""The index inside one process: for a single-process server, for tests, and as the plainest reading of the interface.

``MemoryStore`` plays the server, ``MemoryIndex`` its client; clients that share a store see one another.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from prismserve.core.errors import IndexUnavailableError
from prismserve.core.types import Tier, WorkerInfo, WorkerState
from prismserve.kv_transfer.index.base import check_epoch, check_keys, check_worker_id
from prismserve.kv_transfer.index.claims import Claims
from prismserve.kv_transfer.index.config import IndexConfig
from prismserve.kv_transfer.index.events import EventKind, IndexEvent
from prismserve.kv_transfer.index.mirror import Mirror
from prismserve.kv_transfer.index.records import encode_worker

_FENCES_MAX: Final = 4096


@dataclass(slots=True)
class _Entry:
    info: WorkerInfo
    expires_s: float
    keys: dict[Tier, dict[bytes, None]] = field(default_factory=lambda: {tier: {} for tier in Tier})


class _Feed:
    """Events waiting for one follower; overflowing marks it for a new snapshot."""

    def __init__(self, events_max: int) -> None:
        self.queue: asyncio.Queue[IndexEvent] = asyncio.Queue(events_max)
        self.overflowed = False

    def put(self, event: IndexEvent) -> None:
        if self.queue.full():
            self.overflowed = True
        else:
            self.queue.put_nowait(event)


class MemoryStore:
    """State shared by the clients of one process.

    Args:
        clock: monotonic seconds, by which leases end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.epoch = 0
        self.entries: dict[str, _Entry] = {}
        self.fenced: dict[str, int] = {}
        self.feeds: set[_Feed] = set()

    def publish(self, event: IndexEvent) -> None:
        """Hand an event to every follower."""
        for feed in self.feeds:
            feed.put(event)

    def fence(self, worker_id: str, epoch: int) -> None:
        """Never give this epoch, or an older one, back; the newest 4,096 fences are kept."""
        self.fenced[worker_id] = max(epoch, self.fenced.pop(worker_id, 0))
        while len(self.fenced) > _FENCES_MAX:
            del self.fenced[next(iter(self.fenced))]

    def alive(self, worker_id: str, epoch: int) -> _Entry | None:
        """The entry of this registration, if its lease runs."""
        entry = self.entries.get(worker_id)
        return entry if entry is not None and entry.info.epoch == epoch else None

    def expire(self) -> None:
        """End the leases whose time is over."""
        now = self.clock()
        for worker_id in [name for name, entry in self.entries.items() if entry.expires_s <= now]:
            entry = self.entries.pop(worker_id)
            self.publish(IndexEvent(EventKind.DROP, worker_id, entry.info.epoch))


class MemoryIndex:
    """:class:`~prismserve.kv_transfer.index.base.KVIndex` over a :class:`MemoryStore`."""

    def __init__(
        self,
        store: MemoryStore | None = None,
        config: IndexConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config or IndexConfig()
        self._store = store or MemoryStore(clock)
        self._claims = Claims(self._config.lease_ttl_s, clock)
        self._closed = False

    async def register(self, info: WorkerInfo) -> int:
        """See :meth:`KVIndex.register`."""
        store = self._open()
        check_worker_id(info.worker_id)
        check_epoch(info.epoch)
        encode_worker(info)
        known = store.entries.get(info.worker_id)
        newest = max(known.info.epoch if known else 0, store.fenced.get(info.worker_id, -1) + 1)
        epoch = self._claims.reclaimable(info.worker_id)
        if epoch is None or epoch < newest:
            store.epoch = max(store.epoch, self._claims.epoch_seen, info.epoch) + 1
            epoch = store.epoch
        stored = dataclasses.replace(info, epoch=epoch)
        store.fenced.pop(info.worker_id, None)
        store.entries[info.worker_id] = _Entry(stored, store.clock() + self._config.lease_ttl_s)
        store.publish(IndexEvent(EventKind.REGISTER, info.worker_id, epoch, info=stored))
        self._claims.hold(stored)
        return epoch

    async def heartbeat(self, worker_id: str, epoch: int, state: WorkerState) -> bool:
        """See :meth:`KVIndex.heartbeat`."""
        store = self._open()
        self._claims.touch(worker_id, epoch)
        entry = store.alive(worker_id, epoch)
        if entry is None:
            return False
        self._claims.renewed(worker_id, epoch)
        entry.expires_s = store.clock() + self._config.lease_ttl_s
        if entry.info.state is not state:
            entry.info = dataclasses.replace(entry.info, state=state)
            store.publish(IndexEvent(EventKind.STATE, worker_id, epoch, info=entry.info))
        return True

    async def deregister(self, worker_id: str, epoch: int) -> None:
        """See :meth:`KVIndex.deregister`."""
        store = self._open()
        if store.alive(worker_id, epoch) is not None:
            del store.entries[worker_id]
            store.publish(IndexEvent(EventKind.DROP, worker_id, epoch))
        self._claims.release(worker_id)

    async def drop_worker(self, worker_id: str, epoch: int | None = None) -> None:
        """See :meth:`KVIndex.drop_worker`."""
        store = self._open()
        entry = store.entries.get(worker_id)
        if epoch is None:
            if entry is None:
                return
            epoch = entry.info.epoch
        store.fence(worker_id, epoch)
        if entry is not None and entry.info.epoch <= epoch:
            del store.entries[worker_id]
            store.publish(IndexEvent(EventKind.DROP, worker_id, epoch))

    async def workers(self) -> list[WorkerInfo]:
        """See :meth:`KVIndex.workers`."""
        store = self._open()
        infos = [store.entries[name].info for name in sorted(store.entries)]
        for info in infos:
            self._claims.saw(info.epoch)
        return infos

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
        """See :meth:`KVIndex.announce`."""
        store = self._open()
        check_keys(added)
        check_keys(removed)
        entry = store.alive(worker_id, epoch)
        if entry is None:
            return False
        if replace:
            for held in entry.keys.values():
                held.clear()
            store.publish(IndexEvent(EventKind.RESET, worker_id, epoch))
        entry.keys[tier].update(dict.fromkeys(added))
        for key in removed:
            entry.keys[tier].pop(key, None)
        if added or removed:
            event = IndexEvent(EventKind.ANNOUNCE, worker_id, epoch, tuple(added), tuple(removed), tier=tier)
            store.publish(event)
        return True

    async def follow(self, mirror: Mirror, stop: asyncio.Event) -> None:
        """See :meth:`KVIndex.follow`."""
        store = self._open()
        feed = _Feed(self._config.stream_events_max)
        store.feeds.add(feed)
        try:
            self._snapshot(mirror)
            while not stop.is_set() and not self._closed:
                event = await self._next(feed, stop)
                store.expire()
                if feed.overflowed:
                    feed.overflowed = False
                    while not feed.queue.empty():
                        feed.queue.get_nowait()
                    self._snapshot(mirror)
                elif event is not None:
                    mirror.apply(event)
        finally:
            mirror.synced = False
            store.feeds.discard(feed)

    async def close(self) -> None:
        """See :meth:`KVIndex.close`."""
        self._closed = True

    def _open(self) -> MemoryStore:
        if self._closed:
            message = "the index was closed"
            raise IndexUnavailableError(message)
        self._store.expire()
        return self._store

    def _snapshot(self, mirror: Mirror) -> None:
        entries = self._store.entries
        for info in mirror.workers():
            if info.worker_id not in entries:
                mirror.remove_worker(info.worker_id)
        for worker_id, entry in entries.items():
            mirror.add_worker(entry.info)
            mirror.reset(worker_id, entry.info.epoch)
            for tier, held in entry.keys.items():
                mirror.add(worker_id, entry.info.epoch, held, tier)
            self._claims.saw(entry.info.epoch)
        mirror.resyncs += 1
        mirror.synced = True

    async def _next(self, feed: _Feed, stop: asyncio.Event) -> IndexEvent | None:
        """The next event, or None after the poll interval or when asked to stop."""
        if not feed.queue.empty():
            # Without a pause here a busy publisher would never let the loop turn.
            await asyncio.sleep(0)
            return feed.queue.get_nowait()
        getter = asyncio.ensure_future(feed.queue.get())
        stopper = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait(
                (getter, stopper), timeout=self._config.poll_interval_s, return_when=asyncio.FIRST_COMPLETED
            )
            return getter.result() if getter.done() else None
        finally:
            getter.cancel()
            stopper.cancel()
            await asyncio.wait((getter, stopper))
