r"""The index in Redis or Valkey, 6.2 or newer: standalone, Sentinel or Cluster.

All state is soft: it can be lost at any moment and is rebuilt by its owners. No scripts, no KEYS, no SCAN.

Keys, under ``prismserve:{CLUSTER}:`` (the braces are a hash tag: a Cluster keeps them in one slot):

======================  ======  ========================================================================
``incarnation``         string  random, written by the first registration; another one means the state was lost
``epoch``               zset    one member, ``epoch``, whose score is the last epoch handed out
``workers``             zset    worker id -> its newest epoch; a score of epoch + 0.5 marks a dropped epoch
``lease:ID:EPOCH``      string  the worker's record (msgpack), expires with the lease
``held:TIER:ID:EPOCH``  set     32-byte keys the worker holds in a tier, expires one lease after the lease
``events``              stream  field ``e``: one event (msgpack); capped at about ``stream_events_max``
======================  ======  ========================================================================

A sorted set with ``ZADD GT`` is an atomic maximum, which is all that fencing needs: an epoch can be raised, never
lowered. Entries of an old epoch live under another key name that no reader looks at. Commands go out in pipelines
without transactions: each write is harmless alone, and the event that tells followers always comes last.

Records, memory, and the rights that a user needs are on the page ``docs/redis.md``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prismserve.core.types import Tier, WorkerInfo, WorkerState
from prismserve.kv_transfer.index.base import (
    check_cluster,
    check_epoch,
    check_keys,
    check_worker_id,
)
from prismserve.kv_transfer.index.claims import Claims
from prismserve.kv_transfer.index.client import Connection
from prismserve.kv_transfer.index.config import IndexConfig
from prismserve.kv_transfer.index.events import EventKind, IndexEvent
from prismserve.kv_transfer.index.follower import RedisFollower
from prismserve.kv_transfer.index.mirror import Mirror
from prismserve.kv_transfer.index.records import encode_event, encode_worker
from prismserve.kv_transfer.index.registry import Names, read_registry, read_scores
from prismserve.kv_transfer.index.url import IndexUrl

_EPOCH_MEMBER: Final = "epoch"
_COLLECT_MAX: Final = 64
_TOMBSTONES_MAX: Final = 256
# Long after every lease, and after every zombie's silence: what a cluster shares ends when nobody uses it any more.
_SHARED_TTL_MS: Final = 3_600_000


@dataclass(frozen=True, slots=True)
class _Chunk:
    kind: EventKind
    added: Sequence[bytes] = ()
    removed: Sequence[bytes] = ()


class RedisIndex:
    """:class:`~prismserve.kv_transfer.index.base.KVIndex` over one Redis deployment; belongs to one event loop.

    Args:
        url: where it is.
        cluster: part of every key's name.
        config: leases and limits.
        clock: monotonic seconds, by which an owner's silence is measured.
        wall_clock: seconds since 1970; only ever raises new epochs.
    """

    def __init__(
        self,
        url: IndexUrl,
        cluster: str,
        config: IndexConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        check_cluster(cluster)
        self._config = config or IndexConfig()
        self._names = Names(cluster)
        self._connection = Connection(url, self._config.call_timeout_s, self._config.poll_interval_s)
        self._claims = Claims(self._config.lease_ttl_s, clock, wall_clock)
        self._ttl_ms = max(1, round(self._config.lease_ttl_s * 1000))

    async def check(self) -> None:
        """Prove that the server answers, takes writes, and knows the commands; leaves the epoch counter behind."""
        async with self._connection.call("checking it") as client:
            pipe = client.pipeline(transaction=False)
            pipe.get(self._names.incarnation)
            pipe.zadd(self._names.epoch, {_EPOCH_MEMBER: 0}, gt=True)
            pipe.xrevrange(self._names.events, count=1)
            self._keep(pipe)
            await pipe.execute()

    async def register(self, info: WorkerInfo) -> int:
        """See :meth:`KVIndex.register`."""
        check_worker_id(info.worker_id)
        check_epoch(info.epoch)
        encode_worker(info)
        epoch = await self._reclaim(info.worker_id)
        if epoch is None:
            epoch = await self._new_epoch(info)
        stored = dataclasses.replace(info, epoch=epoch)
        names = self._names
        async with self._connection.call("registering a worker") as client:
            pipe = client.pipeline(transaction=False)
            pipe.set(names.incarnation, secrets.token_hex(16), nx=True)
            pipe.zadd(names.workers, {info.worker_id: epoch}, gt=True)
            pipe.set(names.lease(info.worker_id, epoch), encode_worker(stored), px=self._ttl_ms)
            pipe.delete(*names.all_held(info.worker_id, epoch))
            self._publish(pipe, IndexEvent(EventKind.REGISTER, info.worker_id, epoch, info=stored))
            self._keep(pipe)
            await pipe.execute()
        self._claims.hold(stored)
        await self._collect()
        return epoch

    async def heartbeat(self, worker_id: str, epoch: int, state: WorkerState) -> bool:
        """See :meth:`KVIndex.heartbeat`."""
        check_worker_id(worker_id)
        with self._claims.calling(worker_id, epoch) as info:
            if not await self._renew(worker_id, epoch):
                return False
            self._claims.renewed(worker_id, epoch)
            if info is None or info.state is not state:
                return await self._publish_state(worker_id, epoch, state)
            return True

    async def deregister(self, worker_id: str, epoch: int) -> None:
        """See :meth:`KVIndex.deregister`."""
        check_worker_id(worker_id)
        self._claims.release(worker_id)
        async with self._connection.call("deregistering a worker") as client:
            pipe = client.pipeline(transaction=False)
            # By score, not by name: a newer registration under the same id stays.
            pipe.zremrangebyscore(self._names.workers, epoch, epoch)
            self._end(pipe, worker_id, epoch)
            await pipe.execute()

    async def drop_worker(self, worker_id: str, epoch: int | None = None) -> None:
        """See :meth:`KVIndex.drop_worker`."""
        check_worker_id(worker_id)
        async with self._connection.call("dropping a worker") as client:
            if epoch is None:
                score = await client.zscore(self._names.workers, worker_id)
                if score is None:
                    return
                epoch = int(score)
            pipe = client.pipeline(transaction=False)
            pipe.zadd(self._names.workers, {worker_id: epoch + 0.5}, gt=True)
            self._end(pipe, worker_id, epoch)
            await pipe.execute()

    async def workers(self) -> list[WorkerInfo]:
        """See :meth:`KVIndex.workers`."""
        infos = await read_registry(self._connection, self._names)
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
        """See :meth:`KVIndex.announce`. Each event has a call, and a deadline, of its own."""
        check_worker_id(worker_id)
        check_keys(added)
        check_keys(removed)
        for chunk in self._chunks(added, removed, replace=replace):
            with self._claims.calling(worker_id, epoch):
                if not await self._announce(worker_id, epoch, tier, chunk):
                    return False
        return True

    async def follow(self, mirror: Mirror, stop: asyncio.Event) -> None:
        """See :meth:`KVIndex.follow`."""
        await RedisFollower(self._connection, self._names, self._config, self._claims.saw).run(mirror, stop)

    async def close(self) -> None:
        """See :meth:`KVIndex.close`."""
        await self._connection.close()

    # ------------------------------------------------------------------ private

    async def _reclaim(self, worker_id: str) -> int | None:
        """The old epoch of a worker that was never silent, unless it was fenced meanwhile."""
        epoch = self._claims.reclaimable(worker_id)
        if epoch is None:
            return None
        async with self._connection.call("registering a worker") as client:
            pipe = client.pipeline(transaction=False)
            pipe.zadd(self._names.workers, {worker_id: epoch}, gt=True)
            pipe.zscore(self._names.workers, worker_id)
            pipe.zadd(self._names.epoch, {_EPOCH_MEMBER: self._claims.epoch_seen}, gt=True)
            _, newest, _ = await pipe.execute()
        return epoch if newest == epoch else None

    async def _new_epoch(self, info: WorkerInfo) -> int:
        async with self._connection.call("registering a worker") as client:
            pipe = client.pipeline(transaction=False)
            pipe.zadd(self._names.epoch, {_EPOCH_MEMBER: self._claims.floor(info)}, gt=True)
            pipe.zincrby(self._names.epoch, 1, _EPOCH_MEMBER)
            _, score = await pipe.execute()
        epoch = int(score)
        check_epoch(epoch)
        return epoch

    async def _renew(self, worker_id: str, epoch: int) -> bool:
        names = self._names
        self._claims.saw(epoch)
        async with self._connection.call("renewing a lease") as client:
            pipe = client.pipeline(transaction=False)
            # Only commands that a server at its memory limit still runs: a full index must not lose its workers.
            pipe.pexpire(names.lease(worker_id, epoch), self._ttl_ms)
            pipe.zscore(names.workers, worker_id)
            pipe.zscore(names.epoch, _EPOCH_MEMBER)
            for held in names.all_held(worker_id, epoch):
                pipe.pexpire(held, 2 * self._ttl_ms)
            self._keep(pipe)
            renewed, newest, counter, *_ = await pipe.execute()
            if not renewed or newest != epoch:
                return False
            if counter is None or counter < self._claims.epoch_seen:
                await client.zadd(names.epoch, {_EPOCH_MEMBER: self._claims.epoch_seen}, gt=True)
        return True

    async def _publish_state(self, worker_id: str, epoch: int, state: WorkerState) -> bool:
        lease = self._names.lease(worker_id, epoch)
        registered = next((info for info in await self.workers() if info.worker_id == worker_id), None)
        if registered is None or registered.epoch != epoch:
            return False
        info = dataclasses.replace(registered, state=state)
        if info != registered:
            async with self._connection.call("publishing a state") as client:
                pipe = client.pipeline(transaction=False)
                pipe.set(lease, encode_worker(info), px=self._ttl_ms, xx=True)
                self._publish(pipe, IndexEvent(EventKind.STATE, worker_id, epoch, info=info))
                stored, _ = await pipe.execute()
            if not stored:
                return False
        self._claims.update(info)
        return True

    def _chunks(self, added: Sequence[bytes], removed: Sequence[bytes], *, replace: bool) -> list[_Chunk]:
        size = self._config.announce_keys_max
        if not replace and len(added) <= size and len(removed) <= size:
            return [_Chunk(EventKind.ANNOUNCE, added, removed)] if added or removed else []
        chunks = [_Chunk(EventKind.RESET)] if replace else []
        chunks += [_Chunk(EventKind.ANNOUNCE, added[at : at + size]) for at in range(0, len(added), size)]
        chunks += [_Chunk(EventKind.ANNOUNCE, (), removed[at : at + size]) for at in range(0, len(removed), size)]
        return chunks

    async def _announce(self, worker_id: str, epoch: int, tier: Tier, chunk: _Chunk) -> bool:
        names = self._names
        held = names.held(worker_id, epoch, tier)
        async with self._connection.call("announcing keys") as client:
            pipe = client.pipeline(transaction=False)
            pipe.zscore(names.workers, worker_id)
            pipe.pexpire(names.lease(worker_id, epoch), self._ttl_ms)
            if chunk.kind is EventKind.RESET:
                pipe.delete(*names.all_held(worker_id, epoch))
            if chunk.added:
                pipe.sadd(held, *chunk.added)
            if chunk.removed:
                pipe.srem(held, *chunk.removed)
            # Also without a registration the entries must end: the set may have been made by this very call.
            pipe.pexpire(held, 2 * self._ttl_ms)
            self._publish(pipe, IndexEvent(chunk.kind, worker_id, epoch, chunk.added, chunk.removed, tier=tier))
            newest, renewed, *_ = await pipe.execute()
        return bool(renewed) and newest == epoch

    def _publish(self, pipe: Any, event: IndexEvent) -> None:
        pipe.xadd(
            self._names.events, {"e": encode_event(event)}, maxlen=self._config.stream_events_max, approximate=True
        )

    def _end(self, pipe: Any, worker_id: str, epoch: int) -> None:
        pipe.delete(self._names.lease(worker_id, epoch), *self._names.all_held(worker_id, epoch))
        self._publish(pipe, IndexEvent(EventKind.DROP, worker_id, epoch))
        self._keep(pipe)

    def _keep(self, pipe: Any) -> None:
        """Let what the cluster's workers share last while anybody uses it."""
        for name in (self._names.incarnation, self._names.epoch, self._names.workers, self._names.events):
            pipe.pexpire(name, _SHARED_TTL_MS)

    async def _collect(self) -> None:
        """Forget a few registrations whose lease has ended, and the oldest marks of dropped epochs."""
        scores = await read_scores(self._connection, self._names)
        tombstones = sorted(score for score in scores.values() if score != int(score))
        running = {(name, score) for name, score in scores.items() if score == int(score)}
        alive = {(info.worker_id, float(info.epoch)) for info in await self.workers()}
        ended = sorted(score for _, score in running - alive) + tombstones[:-_TOMBSTONES_MAX]
        if not ended:
            return
        async with self._connection.call("collecting ended registrations") as client:
            pipe = client.pipeline(transaction=False)
            for score in ended[:_COLLECT_MAX]:
                pipe.zremrangebyscore(self._names.workers, score, score)
            await pipe.execute()
