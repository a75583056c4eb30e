"""The server behind the prefix index is harmed: lookups go on, and what workers hold is found again within 10 s.

Owners and routers are those of a cluster, with the timing of a cluster; workers' caches change all the while.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from prismserve.core.types import KVLayout, Role, Tier, WorkerInfo
from prismserve.kv_transfer.index.lease import WorkerLease
from prismserve.kv_transfer.index.mirror import Mirror
from prismserve.kv_transfer.index.redis import RedisIndex
from prismserve.kv_transfer.index.url import parse_url
from tests.kv_transfer.index.servers import QUOTED, Server, program, sentinel_for, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(90)]
RECOVERY_S = 10.0
BLOCKS = 40
HOUR_S = 3600.0
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


class Owner:
    """A worker's presence in the index, and the truth about its cache."""

    def __init__(self, url: str, name: str, wall_clock: Callable[[], float] = time.time) -> None:
        layout = KVLayout("float32", 1, 1, 8, 16)
        info = WorkerInfo(name, Role.MIXED, 0, 1, "n", "h:1", b"", layout, (), b"")
        self.name = name
        self.chains: dict[int, list[bytes]] = {}
        self.numbers = itertools.count()
        self.epochs: list[int] = []
        self.index = RedisIndex(parse_url(url), "chaos", wall_clock=wall_clock)
        self.lease = WorkerLease(
            self.index,
            info,
            lambda: {Tier.DEVICE: [key for keys in self.chains.values() for key in keys]},
            on_epoch=self.epochs.append,
        )

    def compute(self) -> None:
        """A new chain enters the cache."""
        number = next(self.numbers)
        keys = [hashlib.sha256(f"{self.name} {number} {block}".encode()).digest() for block in range(BLOCKS)]
        self.chains[number] = keys
        self.lease.changed(keys, ())

    def evict(self) -> None:
        """The oldest of the chains that are not kept forever leaves it."""
        number = sorted(self.chains)[20]
        self.lease.changed((), self.chains.pop(number)[::-1])


class World:
    """Three owners, two routers' mirrors, and requests that look chains up all the time."""

    def __init__(self, url: str, wall_clock: Callable[[], float] = time.time) -> None:
        self.owners = [Owner(url, f"w{number}", wall_clock) for number in range(3)]
        self.routers = [(RedisIndex(parse_url(url), "chaos"), Mirror()) for _ in range(2)]
        self.stop = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.hits: list[bool] = []
        self.slowest_s = 0.0

    async def open(self) -> None:
        for owner in self.owners:
            for _ in range(30):
                owner.compute()
            await owner.lease.start()
        self.tasks = [asyncio.create_task(index.follow(mirror, self.stop)) for index, mirror in self.routers]
        self.tasks += [asyncio.create_task(self.ask()), asyncio.create_task(self.churn())]
        await self.agree()

    async def ask(self) -> None:
        """Look up chains that their owners have held from the beginning."""
        drawn = random.Random(0)
        while not self.stop.is_set():
            owner, (_, mirror) = drawn.choice(self.owners), drawn.choice(self.routers)
            begun_s = time.perf_counter()
            found = mirror.longest(owner.chains[drawn.randrange(20)])
            self.slowest_s = max(self.slowest_s, time.perf_counter() - begun_s)
            self.hits.append(found == {owner.name: BLOCKS})
            await asyncio.sleep(0.01)

    async def churn(self) -> None:
        while not self.stop.is_set():
            for owner in self.owners:
                owner.compute()
                owner.evict()
            await asyncio.sleep(0.1)

    def agrees(self) -> bool:
        """Whether both mirrors say of every owner exactly what is true."""
        return all(
            mirror.key_count(owner.name) == BLOCKS * len(owner.chains)
            and all(mirror.longest(keys) == {owner.name: BLOCKS} for keys in owner.chains.values())
            for _, mirror in self.routers
            for owner in self.owners
        )

    async def agree(self, timeout_s: float = RECOVERY_S) -> float:
        """Wait until the mirrors agree with the owners; how long that took."""
        begun_s = time.monotonic()
        async with asyncio.timeout(timeout_s):
            while not self.agrees():
                await asyncio.sleep(0.02)
        return time.monotonic() - begun_s

    async def close(self) -> None:
        self.stop.set()
        await asyncio.wait_for(asyncio.gather(*self.tasks), 15)
        for owner in self.owners:
            await owner.lease.stop()
            await owner.index.close()
        for index, _ in self.routers:
            await index.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(program("valkey"), tmp_path)
    made.start()
    yield made
    made.kill()


@pytest.fixture
async def world(server: Server) -> AsyncIterator[World]:
    made = World(server.url)
    await made.open()
    yield made
    await made.close()


def keys_in(server: Server) -> set[str]:
    found = re.findall(rb"prismserve:\{chaos\}:(\S+)", server.command("KEYS", "*"))
    return {name.decode() for name in found}


async def restarted(server: Server) -> None:
    await asyncio.to_thread(server.kill)
    await asyncio.sleep(3)
    await asyncio.to_thread(server.start)


async def flushed(server: Server) -> None:
    server.command("FLUSHALL")


async def frozen(server: Server) -> None:
    server.freeze()
    await asyncio.sleep(10)
    server.thaw()


async def paused(server: Server) -> None:
    server.command("CLIENT", "PAUSE", "10000", "ALL")
    await asyncio.sleep(10)


@pytest.mark.parametrize("harm", [restarted, flushed, frozen, paused], ids=lambda harm: harm.__name__)
async def test_lookups_go_on_and_hits_are_back_within_ten_seconds(
    server: Server, world: World, harm: Callable[[Server], Awaitable[None]]
) -> None:
    """Killed and restarted empty, FLUSHALL, SIGSTOP and CLIENT PAUSE for 10 s: no lookup waits, hits and keys return."""
    baseline = keys_in(server)
    epochs = [list(owner.epochs) for owner in world.owners]
    before = len(world.hits)
    await harm(server)
    during = world.hits[before:]
    # While the server is away the mirrors keep what they knew.
    assert sum(during) >= 0.9 * len(during)
    async with asyncio.timeout(RECOVERY_S):
        # Until then the mirrors may not even have noticed.
        while keys_in(server) != baseline:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        await world.agree()
    after = len(world.hits)
    await asyncio.sleep(1)
    assert all(world.hits[after:])
    assert len(world.hits) > after
    assert world.slowest_s < 0.25
    assert keys_in(server) == baseline
    # Nobody was silent, so nobody's work was fenced.
    assert [owner.epochs for owner in world.owners] == epochs


async def test_nothing_but_the_shared_keys_outlives_the_workers(server: Server) -> None:
    """Restart, then an orderly end: no lease and no entry is left behind."""
    world = World(server.url)
    await world.open()
    await restarted(server)
    await world.agree()
    await world.close()
    assert keys_in(server) <= {"incarnation", "epoch", "workers", "events"}


async def test_a_router_cut_off_from_the_index_believes_what_is_gone_and_its_owner_knows_better(
    server: Server, world: World
) -> None:
    """Two views disagree: the stale one hints at blocks that their owner denies; it is right again after a snapshot."""
    index, stale = world.routers[0]
    owner = world.owners[0]
    number = max(owner.chains)
    keys = owner.chains[number]
    async with asyncio.timeout(5):
        while stale.longest(keys) != {owner.name: BLOCKS}:
            await asyncio.sleep(0.01)
    apply, stale.apply = stale.apply, lambda _event: True
    owner.lease.changed((), owner.chains.pop(number))
    await asyncio.sleep(0.5)
    assert stale.longest(keys) == {owner.name: BLOCKS}
    assert world.routers[1][1].longest(keys) == {}
    assert not any(key in held for held in owner.chains.values() for key in keys)
    stale.apply = apply
    server.command("SET", index._names.incarnation, "another")
    await world.agree()
    assert stale.longest(keys) == {}


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
async def test_a_jump_of_the_workers_wall_clock_ends_no_lease(server: Server, jump_s: float) -> None:
    """An hour forth or back at the owners: no epoch changes, no hit is lost, and later epochs still grow."""
    offset_s = [0.0]
    world = World(server.url, lambda: time.time() + offset_s[0])
    await world.open()
    epochs = [list(owner.epochs) for owner in world.owners]
    before = len(world.hits)
    offset_s[0] = jump_s
    await asyncio.sleep(5)
    assert all(world.hits[before:])
    assert [owner.epochs for owner in world.owners] == epochs
    late = Owner(server.url, "late", lambda: time.time() + offset_s[0])
    assert await late.lease.start() > max(epoch for owner in epochs for epoch in owner)
    await late.lease.stop()
    await late.index.close()
    await world.close()


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
async def test_a_jump_of_the_servers_wall_clock_costs_no_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """An hour forth ends every lease at the server at once, an hour back none: owners announce again, under their epochs."""
    if FAKETIME is None:
        pytest.skip("libfaketime is not installed")
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    monkeypatch.setenv("LD_PRELOAD", str(FAKETIME))
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(clock))
    monkeypatch.setenv("FAKETIME_NO_CACHE", "1")
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    server = Server(program("valkey"), tmp_path)
    server.start()
    monkeypatch.delenv("LD_PRELOAD")
    try:
        world = World(server.url)
        await world.open()
        epochs = [list(owner.epochs) for owner in world.owners]
        before_s = int(re.search(rb"\$10\r\n(\d+)", server.command("TIME"))[1])
        clock.write_text(f"{jump_s:+.0f}\n")
        after_s = int(re.search(rb"\$10\r\n(\d+)", server.command("TIME"))[1])
        assert abs(after_s - before_s - jump_s) < 60
        await asyncio.sleep(3)
        await world.agree()
        assert [owner.epochs for owner in world.owners] == epochs
        assert world.slowest_s < 0.25
        await world.close()
    finally:
        server.kill()


async def test_a_sentinels_new_master_is_followed(tmp_path: Path) -> None:
    """The master dies, its replica takes over: what was not replicated is announced again, within 10 s of the takeover."""
    homes = [tmp_path / name for name in ("master", "replica")]
    for home in homes:
        home.mkdir()
    master = Server(program("valkey"), homes[0])
    master.start()
    follows = f'replicaof 127.0.0.1 {master.port}\nmasterauth "{master.password}"\nrepl-diskless-sync-delay 0'
    replica = Server(program("valkey"), homes[1], follows)
    try:
        replica.start()
        await asyncio.to_thread(wait_until, lambda: b"master_link_status:up" in replica.command("INFO", "replication"))
        with sentinel_for(master, tmp_path) as watcher:
            await asyncio.to_thread(
                wait_until, lambda: str(replica.port).encode() in watcher.command("SENTINEL", "REPLICAS", "main")
            )
            world = World(f"redis+sentinel://:{QUOTED}@127.0.0.1:{watcher.port}/main?sentinel_password={QUOTED}")
            await world.open()
            master.kill()
            await asyncio.to_thread(wait_until, lambda: b"role:master" in replica.command("INFO", "replication"))
            await asyncio.sleep(1)
            await world.agree()
            assert world.slowest_s < 0.25
            await world.close()
    finally:
        master.kill()
        replica.kill()
