"""Keeping a mirror in step with Redis: a snapshot, then the event stream, and a new snapshot after any loss.

Order makes the two fit: the stream's last id is read first, then the sets, then events after that id are replayed.
Adding and removing keys are idempotent, so an event that the snapshot already contains does no harm.

Loss is noticed in two ways. A read that returned fewer events than it asked for cannot have skipped any, because a
capped stream keeps more than one read asks for; after a full read the follower checks that the id it read from still
exists. And every poll interval it checks that id and the incarnation, which finds a flushed or restarted server.

A worker that leaves the registry without a DROP event stays in the mirror for half a lease: after a flush or a jump
of the server's clock its owner is back within a heartbeat.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

from prismserve.core.errors import ConfigurationError, IndexUnavailableError
from prismserve.core.types import Tier, WorkerInfo
from prismserve.kv_transfer.index.client import Connection
from prismserve.kv_transfer.index.config import IndexConfig
from prismserve.kv_transfer.index.mirror import Mirror
from prismserve.kv_transfer.index.records import decode_event
from prismserve.kv_transfer.index.registry import Names, ask_scores, read_registry

_LOG = logging.getLogger(__name__)
_START: Final = "0-0"
_READ_EVENTS: Final = 64
_YIELD_KEYS: Final = 8192
_BACKOFF_MIN_S: Final = 0.05
_BACKOFF_MAX_S: Final = 1.0


class RedisFollower:
    """One run of ``follow``.

    Args:
        saw_epoch: told every epoch of the registry.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        connection: Connection,
        names: Names,
        config: IndexConfig,
        saw_epoch: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._names = names
        self._config = config
        self._saw_epoch = saw_epoch
        self._clock = clock
        self._read_events = min(_READ_EVENTS, config.stream_events_max)
        self._position: str | None = None
        self._incarnation: bytes | None = None
        self._missing: dict[str, float] = {}

    async def run(self, mirror: Mirror, stop: asyncio.Event) -> None:
        """Follow until ``stop`` is set."""
        backoff_s = _BACKOFF_MIN_S
        try:
            while not stop.is_set():
                try:
                    if self._position is None or await self._check() is None:
                        await self._snapshot(mirror)
                    mirror.synced = True
                    backoff_s = _BACKOFF_MIN_S
                    await self._replay(mirror, stop)
                except IndexUnavailableError as error:
                    if mirror.synced:
                        _LOG.warning("following the index is interrupted: %s", error.message)
                    mirror.synced = False
                    backoff_s = min(2 * backoff_s, _BACKOFF_MAX_S)
                if not stop.is_set():
                    await _pause(stop, backoff_s)
        finally:
            mirror.synced = False

    # ------------------------------------------------------------------ snapshot

    async def _snapshot(self, mirror: Mirror) -> None:
        self._position = None
        async with self._connection.call("taking a snapshot") as client:
            pipe = client.pipeline(transaction=False)
            pipe.get(self._names.incarnation)
            pipe.xrevrange(self._names.events, count=1)
            incarnation, last = await pipe.execute()
        for info in await self._refresh(mirror):
            await self._load(mirror, info)
        self._incarnation = incarnation
        self._position = last[0][0].decode() if last else _START
        mirror.resyncs += 1

    async def _load(self, mirror: Mirror, info: WorkerInfo) -> None:
        """Replace one worker's entries by what the index holds, without stopping the loop for long."""
        pages = [(tier, page) for tier in Tier async for page in self._pages(info, tier)]
        mirror.reset(info.worker_id, info.epoch)
        for tier, keys in pages:
            # A set has no order.
            mirror.add(info.worker_id, info.epoch, keys, tier, in_order=False)
            mirror.sweep(len(keys))
            await asyncio.sleep(0)

    async def _pages(self, info: WorkerInfo, tier: Tier) -> AsyncIterator[list[bytes]]:
        """The keys one registration holds in one tier."""
        held = self._names.held(info.worker_id, info.epoch, tier)
        cursor = 0
        while True:
            async with self._connection.call("taking a snapshot") as client:
                cursor, keys = await client.sscan(held, cursor, count=self._config.snapshot_page_keys)
            if keys:
                yield keys
            if cursor == 0:
                return

    # ------------------------------------------------------------------ events

    async def _replay(self, mirror: Mirror, stop: asyncio.Event) -> None:
        """Apply events until asked to stop, or until some were lost."""
        next_check_s = self._clock() + self._config.poll_interval_s
        while not stop.is_set():
            position = self._position
            events = await self._read(position or _START, next_check_s - self._clock())
            await self._apply(mirror, events)
            full = len(events) >= self._read_events
            if full and not await self._exists(position or _START):
                _LOG.info("the index trimmed events before they were read; taking a new snapshot")
                self._position = None
                return
            if self._clock() >= next_check_s:
                pairs = await self._check()
                if pairs is None:
                    _LOG.info("the index lost its state; taking a new snapshot")
                    self._position = None
                    return
                await self._refresh(mirror, pairs)
                mirror.sweep()
                next_check_s = self._clock() + self._config.poll_interval_s

    async def _read(self, position: str, wait_s: float) -> list[tuple[bytes, dict[bytes, bytes]]]:
        wait_s = min(max(wait_s, 0.001), self._config.poll_interval_s)
        async with self._connection.call("reading events", wait_s) as client:
            reply: Any = await client.xread(
                {self._names.events: position}, count=self._read_events, block=max(1, round(wait_s * 1000))
            )
        if not reply:
            return []
        events: list[tuple[bytes, dict[bytes, bytes]]] = reply[0][1]
        return events

    async def _apply(self, mirror: Mirror, events: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        keys = 0
        for identifier, fields in events:
            try:
                event = decode_event(fields.get(b"e", b""))
            except ConfigurationError as error:
                mirror.rejected_events += 1
                _LOG.warning("an index event is ignored: %s", error.message)
            else:
                mirror.apply(event)
                self._saw_epoch(event.epoch)
                keys += len(event.added) + len(event.removed)
            self._position = identifier.decode()
            if keys >= _YIELD_KEYS:
                keys = 0
                await asyncio.sleep(0)

    # ------------------------------------------------------------------ checks

    async def _exists(self, position: str) -> bool:
        if position == _START:
            return False
        async with self._connection.call("reading events") as client:
            return bool(await client.xrange(self._names.events, position, position, count=1))

    async def _check(self) -> Sequence[tuple[bytes, float]] | None:
        """The registry's scores; None unless the stream still holds the event read last, in the incarnation it was read in.

        One round trip: an event that comes meanwhile is late by it.
        """
        position = self._position or _START
        async with self._connection.call("reading events") as client:
            pipe = client.pipeline(transaction=False)
            pipe.get(self._names.incarnation)
            pipe.xrange(self._names.events, position, position, count=1)
            ask_scores(pipe, self._names)
            incarnation, entry, pairs = await pipe.execute()
        if self._incarnation is None:
            # The first registration came after the snapshot: nothing was there that could have been lost.
            self._incarnation = incarnation
        if incarnation != self._incarnation or (position != _START and not entry):
            return None
        scores: Sequence[tuple[bytes, float]] = pairs
        return scores

    async def _refresh(self, mirror: Mirror, pairs: Sequence[tuple[bytes, float]] | None = None) -> list[WorkerInfo]:
        """Bring the mirror's workers in line with the registry, and return what it lists."""
        infos = await read_registry(self._connection, self._names, pairs)
        for info in infos:
            mirror.add_worker(info)
            self._saw_epoch(info.epoch)
        registered = {info.worker_id for info in infos}
        now = self._clock()
        self._missing = {
            info.worker_id: self._missing.get(info.worker_id, now)
            for info in mirror.workers()
            if info.worker_id not in registered
        }
        for worker_id, since_s in list(self._missing.items()):
            if now - since_s >= self._config.lease_ttl_s / 2:
                mirror.remove_worker(worker_id)
                del self._missing[worker_id]
        return infos


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    """Wait, but no longer than until ``stop`` is set."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
