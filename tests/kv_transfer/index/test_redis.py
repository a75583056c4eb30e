"""The index through faults of its server: restart, flush, pause, memory limit."""

from __future__ import annotations

import asyncio
import hashlib
import re

import pytest

from prismserve.core.errors import IndexUnavailableError
from prismserve.core.types import WorkerState
from prismserve.kv_transfer.index.config import IndexConfig
from prismserve.kv_transfer.index.redis import RedisIndex
from prismserve.kv_transfer.index.url import parse_url


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


async def reannounce(index, info, epoch, keys):
    """What an owner does after a False: the epoch it gets and whether all was announced."""
    again = await index.register(info)
    return again, await index.announce(info.worker_id, again, keys, replace=True)


async def test_a_flush_is_noticed_and_the_same_epoch_is_taken_back(server, redis_index, info, follow, eventually):
    index = redis_index(server)
    mirror = follow(redis_index(server))
    await eventually(lambda: mirror.synced)
    epoch = await index.register(info())
    await index.announce("w1", epoch, [key(1), key(2)])
    await eventually(lambda: mirror.holders(key(2)))
    server.command("FLUSHALL")
    assert not await index.heartbeat("w1", epoch, WorkerState.READY)
    assert await reannounce(index, info(), epoch, [key(2), key(3)]) == (epoch, True)
    await eventually(lambda: mirror.holders(key(3)))
    assert mirror.holders(key(1)) == ()
    assert mirror.holders(key(2)) == ("w1",)


async def test_a_flush_does_not_hide_workers_that_come_back_in_time(server, redis_index, info, follow, eventually):
    index = redis_index(server)
    mirror = follow(redis_index(server))
    epoch = await index.register(info())
    await eventually(mirror.workers)
    changes = []
    mirror.on_workers_changed = lambda: changes.append([worker.worker_id for worker in mirror.workers()])
    server.command("FLUSHALL")
    resyncs = mirror.resyncs
    await eventually(lambda: mirror.resyncs > resyncs)
    await index.register(info())
    await asyncio.sleep(0.3)
    assert [worker.epoch for worker in mirror.workers()] == [epoch]
    assert [] not in changes


async def test_new_epochs_after_a_flush_exceed_those_before_even_with_the_clock_set_back(server, redis_index, info):
    old, late, fresh = redis_index(server), redis_index(server), redis_index(server)
    first = await old.register(info("a"))
    before = await late.register(info("b"))
    assert before > first
    server.command("FLUSHALL")
    # The clocks of everyone who registers from now on stand at 1970.
    for index in (old, late, fresh):
        index._claims._wall_clock = lambda: 0.0
    assert await late.register(info("b")) == before
    assert await fresh.register(info("a")) > before


async def test_a_restart_empty_is_survived_on_both_sides(server, redis_index, info, follow, eventually):
    index = redis_index(server)
    mirror = follow(redis_index(server))
    epoch = await index.register(info())
    await index.announce("w1", epoch, [key(1)])
    await eventually(lambda: mirror.holders(key(1)))
    server.kill()
    with pytest.raises(IndexUnavailableError):
        await index.heartbeat("w1", epoch, WorkerState.READY)
    await eventually(lambda: not mirror.synced)
    assert mirror.holders(key(1)) == ("w1",)
    server.start()
    assert not await index.heartbeat("w1", epoch, WorkerState.READY)
    assert await reannounce(index, info(), epoch, [key(2)]) == (epoch, True)
    await eventually(lambda: mirror.synced and mirror.holders(key(2)))
    assert mirror.holders(key(1)) == ()


async def test_a_frozen_server_costs_a_deadline_and_nothing_else(server, redis_index, info, follow, eventually, config):
    index = redis_index(server)
    mirror = follow(redis_index(server))
    epoch = await index.register(info())
    await index.announce("w1", epoch, [key(1)])
    await eventually(lambda: mirror.holders(key(1)))
    server.freeze()
    loop = asyncio.get_running_loop()
    for _ in range(2):
        begun = loop.time()
        with pytest.raises(IndexUnavailableError, match=f"no answer within {config.call_timeout_s:g} s"):
            await index.heartbeat("w1", epoch, WorkerState.READY)
        assert loop.time() - begun < config.call_timeout_s + 0.5
    assert mirror.holders(key(1)) == ("w1",)
    await asyncio.sleep(config.lease_ttl_s / 4)
    server.thaw()
    # The lease ended while the server stood still; the worker never fell silent.
    assert not await index.heartbeat("w1", epoch, WorkerState.READY)
    assert await reannounce(index, info(), epoch, [key(1), key(2)]) == (epoch, True)
    await eventually(lambda: mirror.synced and mirror.holders(key(2)))


async def test_paused_writes_are_waited_for_within_the_deadline(server, redis_index, info):
    index = redis_index(server)
    epoch = await index.register(info())
    server.command("CLIENT", "PAUSE", "300", "WRITE")
    assert await index.announce("w1", epoch, [key(1)])


async def test_a_full_server_refuses_announcements_but_keeps_its_workers(server, redis_index, info):
    index = redis_index(server)
    epoch = await index.register(info())
    server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    server.command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(IndexUnavailableError, match="memory limit"):
        await index.announce("w1", epoch, [key(1)])
    assert await index.heartbeat("w1", epoch, WorkerState.READY)
    assert len(await index.workers()) == 1


async def test_everything_a_dead_worker_left_expires(server, redis_index, info, config):
    index = redis_index(server)
    dead, late = await index.register(info("dead")), await index.register(info("late"))
    await index.announce("dead", dead, [key(1)])
    await index.drop_worker("late", late)
    assert not await index.announce("late", late, [key(2)])
    assert b"held:device:late" in server.command("KEYS", "*")
    await asyncio.sleep(2.1 * config.lease_ttl_s)
    left = server.command("KEYS", "*")
    assert b"lease:" not in left
    assert b"held:" not in left


async def test_what_a_cluster_shares_ends_when_nobody_uses_it_any_more(server, redis_index, info):
    index = redis_index(server)
    await index.check()
    epoch = await index.register(info())
    await index.announce("w1", epoch, [key(1)])
    await index.heartbeat("w1", epoch, WorkerState.READY)
    await index.deregister("w1", epoch)
    left = re.findall(rb"prismserve:\S+", server.command("KEYS", "*"))
    assert {name.rpartition(b":")[2] for name in left} == {b"incarnation", b"epoch", b"events"}
    for name in left:
        ttl_s = int(re.search(rb":(-?\d+)", server.command("TTL", name.decode())[3:])[1])
        assert 3000 < ttl_s <= 3600


async def test_ended_registrations_are_collected_and_the_latest_fences_are_kept(server, redis_index, info, config):
    index = redis_index(server)
    await index.register(info("gone"))
    dropped = await index.register(info("dropped"))
    await index.drop_worker("dropped", dropped)
    await asyncio.sleep(1.1 * config.lease_ttl_s)
    await index.register(info("new"))
    members = server.command("ZRANGE", index._names.workers, "0", "-1")
    assert b"gone" not in members
    assert b"dropped" in members
    assert b"new" in members


async def test_two_clusters_on_one_server_do_not_see_each_other(shared_server, redis_index, info, follow, eventually):
    one, two = redis_index(shared_server, cluster="one"), redis_index(shared_server, cluster="two")
    mirror = follow(two)
    await eventually(lambda: mirror.synced)
    epoch = await one.register(info("w-one"))
    await one.announce("w-one", epoch, [key(1)])
    assert await two.workers() == []
    assert mirror.holders(key(1)) == ()
    await one.deregister("w-one", epoch)


async def test_records_of_another_release_are_left_out_and_do_not_hide_the_rest(shared_server, redis_index, info):
    index = redis_index(shared_server)
    epoch = await index.register(info("old"))
    await index.register(info("good"))
    shared_server.command("SET", index._names.lease("old", epoch), "junk", "KEEPTTL")
    assert [worker.worker_id for worker in await index.workers()] == ["good"]


def test_leases_shorter_than_a_millisecond_still_last(cluster):
    index = RedisIndex(
        parse_url("redis://127.0.0.1:1"),
        cluster,
        IndexConfig.model_construct(**{**IndexConfig().model_dump(), "lease_ttl_s": 1e-5}),
    )
    assert index._ttl_ms == 1
