"""Following through gaps: trimmed streams, unreadable events, slow readers."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from prismserve.kv_transfer.index.mirror import Mirror


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


@pytest.fixture
def tight(config):
    """A stream that holds few events."""
    return config.model_copy(update={"stream_events_max": 8, "announce_keys_max": 4})


async def test_a_follower_that_fell_behind_a_trimmed_stream_takes_a_new_snapshot(
    shared_server, redis_index, info, eventually, tight
):
    owner, reader = redis_index(shared_server, tight), redis_index(shared_server, tight)
    mirror, stop = Mirror(), asyncio.Event()
    epoch = await owner.register(info())
    await owner.announce("w1", epoch, [key(0)])
    task = asyncio.create_task(reader.follow(mirror, stop))
    await eventually(lambda: mirror.holders(key(0)))
    # Hold the reader's connection back while more events pass than the stream keeps.
    held = asyncio.Event()
    original = reader._connection.client.xread

    async def late(*arguments, **named):
        await held.wait()
        return await original(*arguments, **named)

    resyncs = mirror.resyncs
    reader._connection.client.xread = late
    await asyncio.sleep(0.15)
    keys = [key(n) for n in range(1, 400)]
    await owner.announce("w1", epoch, [], [key(0)])
    for start in range(0, len(keys), 2):
        await owner.announce("w1", epoch, keys[start : start + 2])
    shared_server.command("XTRIM", owner._names.events, "MAXLEN", "8")
    held.set()
    await eventually(lambda: mirror.longest(keys) == {"w1": len(keys)})
    assert mirror.resyncs > resyncs
    assert mirror.holders(key(0)) == ()
    stop.set()
    await asyncio.wait_for(task, 5)


async def test_a_follower_that_came_before_the_first_worker_takes_one_snapshot(
    shared_server, redis_index, info, follow, eventually, config
):
    index = redis_index(shared_server)
    mirror = follow(redis_index(shared_server))
    await eventually(lambda: mirror.synced)
    epoch = await index.register(info())
    for number in range(5):
        await index.announce("w1", epoch, [key(number)])
        await asyncio.sleep(config.poll_interval_s)
    await eventually(lambda: mirror.key_count("w1") == 5)
    assert mirror.resyncs == 1


async def test_a_stream_deleted_under_an_idle_follower_is_noticed(shared_server, redis_index, info, follow, eventually):
    index = redis_index(shared_server)
    mirror = follow(redis_index(shared_server))
    await eventually(lambda: mirror.synced)
    epoch = await index.register(info())
    # A key that comes after the snapshot came through the stream. A follower that has read nothing of it misses nothing of it.
    await index.announce("w1", epoch, [key(0)])
    await eventually(lambda: mirror.holders(key(0)))
    resyncs = mirror.resyncs
    shared_server.command("DEL", index._names.events)
    await eventually(lambda: mirror.resyncs > resyncs)
    await index.announce("w1", epoch, [key(1)])
    await eventually(lambda: mirror.holders(key(1)))


async def test_an_unreadable_event_is_counted_and_skipped(shared_server, redis_index, info, follow, eventually):
    index = redis_index(shared_server)
    mirror = follow(redis_index(shared_server))
    epoch = await index.register(info())
    await eventually(mirror.workers)
    shared_server.command("XADD", index._names.events, "*", "e", "junk")
    shared_server.command("XADD", index._names.events, "*", "other", "field")
    await index.announce("w1", epoch, [key(1)])
    await eventually(lambda: mirror.holders(key(1)))
    assert mirror.rejected_events == 2


async def test_a_stale_entry_is_gone_after_the_next_replacement(shared_server, redis_index, info, follow, eventually):
    index = redis_index(shared_server)
    mirror = follow(redis_index(shared_server))
    epoch = await index.register(info())
    await index.announce("w1", epoch, [key(1)])
    await eventually(lambda: mirror.holders(key(1)))
    # An entry that only this mirror believes in.
    mirror.add("w1", epoch, [key(99)])
    await index.announce("w1", epoch, [key(1)], replace=True)
    await eventually(lambda: not mirror.holders(key(99)))
    await eventually(lambda: mirror.holders(key(1)))


async def test_events_reach_a_mirror_within_a_few_milliseconds(shared_server, redis_index, info, follow, eventually):
    index = redis_index(shared_server)
    mirror = follow(redis_index(shared_server))
    epoch = await index.register(info())
    await eventually(mirror.workers)
    loop = asyncio.get_running_loop()
    lags = []
    for number in range(20):
        begun = loop.time()
        await index.announce("w1", epoch, [key(number)])
        while not mirror.holders(key(number)):
            await asyncio.sleep(0)
        lags.append(loop.time() - begun)
    # The target on a quiet machine is 10 ms; the median of a busy one must at least not be the poll interval.
    assert sorted(lags)[10] < 0.05
