"""The index over a real Valkey: how late a mirror is, how fast it is rebuilt, and what a lookup in Redis would cost.

Owners run in a process of their own, as workers do; the mirror follows in this one, as a router's does. Both use
``time.monotonic``, which on Linux is one clock for all processes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Final, Self

import redis

from benchmarks.index.probe import KEY_BYTES, LOOKUPS, Chain, load
from prismserve.core.types import KVLayout, Role, Tier, WorkerInfo
from prismserve.kv_transfer.index.connect import open_index
from prismserve.kv_transfer.index.embedded import EmbeddedServer
from prismserve.kv_transfer.index.events import IndexEvent
from prismserve.kv_transfer.index.lease import WorkerLease
from prismserve.kv_transfer.index.mirror import Mirror

SERVER_BYTES: Final = 2 << 30
OWNERS: Final = 4
LAG_BLOCKS: Final = 16
LAG_INTERVAL_S: Final = 0.01
STEP_TIMEOUT_S: Final = 120.0


def mget_us(blocks: int) -> dict[str, float]:
    """Median microseconds of one ``MGET`` of 128 and of 2,048 keys with redis-py, among ``blocks`` stored ones."""
    found = {}
    with EmbeddedServer(SERVER_BYTES) as server, redis.Redis.from_url(server.url) as client:
        chains = load(blocks)
        for chain in chains:
            client.mset(dict.fromkeys(chain.keys(), b"holder"))
        for length in (128, 2048):
            asked = [chain.keys() for chain in chains if chain.blocks == length][: LOOKUPS // 4]
            times_us = []
            for keys in asked:
                begun_s = time.perf_counter()
                answer = client.mget(keys)
                times_us.append((time.perf_counter() - begun_s) * 1e6)
                if None in answer:
                    message = "MGET lost a key"
                    raise RuntimeError(message)
            found[f"mget_{length}_p50_us"] = statistics.median(times_us)
    return found


def lag_ms(announcements: int, held_blocks: int) -> list[float]:
    """Milliseconds from a worker's ``WorkerLease.changed`` to the mirror's answer, for each of some announcements."""
    with EmbeddedServer(SERVER_BYTES) as server, _Owners(server.url, held_blocks) as owners:
        return asyncio.run(_lag(server.url, owners, announcements, held_blocks))


def rebuild_s(blocks: int) -> dict[str, float]:
    """Seconds until a mirror has all blocks: from a snapshot, and from owners that announce again after a flush."""
    with EmbeddedServer(SERVER_BYTES) as server, _Owners(server.url, blocks):
        return asyncio.run(_rebuild(server.url, blocks))


# ---------------------------------------------------------------------------------------------------------- the mirror


class _WatchedMirror(Mirror):
    """A mirror that notes when it first answers with a whole chain."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[bytes, tuple[int, tuple[bytes, ...]]] = {}
        self.answered_s: dict[int, float] = {}

    def apply(self, event: IndexEvent) -> bool:
        """Apply, and look up the chain whose last key has come."""
        applied = super().apply(event)
        for key in event.added:
            number, chain = self.waiting.get(key, (-1, ()))
            if chain and self.longest(chain).get("lag") == len(chain):
                self.answered_s[number] = time.monotonic()
        return applied


async def _lag(url: str, owners: _Owners, announcements: int, held_blocks: int) -> list[float]:
    mirror = _WatchedMirror()
    chains = _lag_chains(announcements)
    mirror.waiting = {chain[-1]: (number, chain) for number, chain in enumerate(chains)}
    async with _following(url, mirror):
        await _until(lambda: _blocks(mirror) == held_blocks)
        announced_s = await owners.ask(announcements)
        await _until(lambda: len(mirror.answered_s) == announcements)
    return [(mirror.answered_s[number] - at_s) * 1e3 for number, at_s in enumerate(announced_s)]


async def _rebuild(url: str, blocks: int) -> dict[str, float]:
    warm, fresh = Mirror(), Mirror()
    async with _following(url, warm):
        await _until(lambda: _blocks(warm) == blocks)
        begun_s = time.monotonic()
        async with _following(url, fresh):
            await _until(lambda: _blocks(fresh) == blocks)
            snapshot_s = time.monotonic() - begun_s
        with redis.Redis.from_url(url) as client:
            client.flushall()
        begun_s = time.monotonic()
        await _until(lambda: _blocks(warm) < blocks)
        await _until(lambda: _blocks(warm) == blocks)
        return {"snapshot_s": snapshot_s, "flushed_s": time.monotonic() - begun_s}


class _following:  # noqa: N801 - reads as a verb where it is used
    """Let a mirror follow the index at ``url`` for a while."""

    def __init__(self, url: str, mirror: Mirror) -> None:
        self._url = url
        self._mirror = mirror
        self._stop = asyncio.Event()

    async def __aenter__(self) -> None:
        self._index = await open_index(self._url)
        self._task = asyncio.create_task(self._index.follow(self._mirror, self._stop))

    async def __aexit__(self, *_exception: object) -> None:
        self._stop.set()
        await asyncio.wait_for(self._task, STEP_TIMEOUT_S)
        await self._index.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(STEP_TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - mirrors have no event for this
            await asyncio.sleep(0.005)


def _blocks(mirror: Mirror) -> int:
    return sum(mirror.key_count(info.worker_id) for info in mirror.workers())


# ---------------------------------------------------------------------------------------------------------- the owners


class _Owners:
    """A process with some workers' leases, which together hold ``blocks`` blocks."""

    def __init__(self, url: str, blocks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_own, args=(url, blocks, theirs), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pipe.send(None)
        self._process.join(STEP_TIMEOUT_S)

    async def ask(self, announcements: int) -> list[float]:
        """Let one worker announce chains one after the other; when it did."""
        self._pipe.send(announcements)
        await asyncio.to_thread(self._pipe.poll, STEP_TIMEOUT_S)
        times_s: list[float] = self._pipe.recv()
        return times_s


def _own(url: str, blocks: int, orders: Connection) -> None:
    asyncio.run(_hold(url, blocks, orders))


async def _hold(url: str, blocks: int, orders: Connection) -> None:
    index = await open_index(url)
    keys = Chain(-2, blocks).keys()
    leases = []
    for number in range(OWNERS):
        held = keys[number * blocks // OWNERS : (number + 1) * blocks // OWNERS]
        leases.append(WorkerLease(index, _info(f"w{number}"), lambda held=held: {Tier.DEVICE: held}))  # type: ignore[misc]
    announced: list[bytes] = []
    leases.append(WorkerLease(index, _info("lag"), lambda: {Tier.DEVICE: announced}))
    for lease in leases:
        await lease.start()
    while True:
        await asyncio.to_thread(orders.poll, None)
        announcements = orders.recv()
        if announcements is None:
            break
        times_s = []
        for chain in _lag_chains(announcements):
            announced += chain
            times_s.append(time.monotonic())
            leases[-1].changed(chain, ())
            await asyncio.sleep(LAG_INTERVAL_S)
        orders.send(times_s)
    for lease in leases:
        await lease.stop()
    await index.close()


def _lag_chains(count: int) -> list[tuple[bytes, ...]]:
    drawn = random.Random(1)
    return [tuple(drawn.randbytes(KEY_BYTES) for _ in range(LAG_BLOCKS)) for _ in range(count)]


def _info(worker_id: str) -> WorkerInfo:
    layout = KVLayout("float32", 1, 1, 8, 16)
    return WorkerInfo(worker_id, Role.MIXED, 0, 1, "n", "h:1", b"", layout, (), b"")
