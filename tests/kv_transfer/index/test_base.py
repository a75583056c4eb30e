"""What every implementation of the index must do."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from prismserve.core.errors import ConfigurationError
from prismserve.core.types import Tier, WorkerState
from prismserve.kv_transfer.index.mirror import PrefixMatch


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


async def test_epochs_grow_with_every_registration(index, new_index, info):
    other = new_index()
    epochs = [await index.register(info("a")), await other.register(info("b")), await new_index().register(info("a"))]
    assert epochs == sorted(set(epochs))


async def test_a_new_epoch_exceeds_the_largest_one_the_caller_knows(index, info):
    assert await index.register(info(epoch=2**50)) > 2**50


async def test_a_registered_worker_is_listed_as_it_was_given(index, new_index, info):
    epoch = await index.register(info("b", state=WorkerState.STARTING))
    await index.register(info("a"))
    listed = await new_index().workers()
    assert [worker.worker_id for worker in listed] == ["a", "b"]
    assert listed[1] == info("b", epoch=epoch, state=WorkerState.STARTING)


async def test_heartbeats_publish_the_state(index, new_index, info):
    epoch = await index.register(info())
    assert await index.heartbeat("w1", epoch, WorkerState.DRAINING)
    assert (await new_index().workers())[0].state is WorkerState.DRAINING


async def test_a_lease_that_is_not_renewed_ends(index, info, config):
    epoch = await index.register(info())
    await asyncio.sleep(config.lease_ttl_s * 1.1)
    assert await index.workers() == []
    assert not await index.heartbeat("w1", epoch, WorkerState.READY)
    assert not await index.announce("w1", epoch, [key(1)])


async def test_heartbeats_keep_a_lease(index, info, config):
    epoch = await index.register(info())
    for _ in range(4):
        await asyncio.sleep(config.lease_ttl_s * 0.4)
        assert await index.heartbeat("w1", epoch, WorkerState.READY)
    assert len(await index.workers()) == 1


async def test_a_worker_that_fell_silent_gets_a_new_epoch(index, info, config):
    epoch = await index.register(info())
    await asyncio.sleep(config.lease_ttl_s * 1.1)
    assert await index.register(info()) > epoch


async def test_a_worker_that_was_never_silent_gets_its_epoch_back(index, info):
    epoch = await index.register(info())
    assert await index.register(info()) == epoch


async def test_a_dropped_epoch_is_never_given_back(index, new_index, info):
    epoch = await index.register(info())
    await new_index().drop_worker("w1")
    assert not await index.heartbeat("w1", epoch, WorkerState.READY)
    assert await index.workers() == []
    assert await index.register(info()) > epoch


async def test_dropping_an_older_epoch_leaves_the_newer_one(index, new_index, info):
    old = await index.register(info())
    new = await new_index().register(info())
    await index.drop_worker("w1", old)
    assert [worker.epoch for worker in await index.workers()] == [new]


async def test_an_older_epoch_is_fenced_by_a_newer_one(index, new_index, info, follow, eventually):
    mirror = follow(index)
    old = await index.register(info())
    await index.announce("w1", old, [key(1)])
    await eventually(lambda: mirror.holders(key(1)))
    successor = new_index()
    new = await successor.register(info())
    assert not await index.heartbeat("w1", old, WorkerState.READY)
    assert not await index.announce("w1", old, [key(2)])
    assert await successor.announce("w1", new, [key(3)])
    await eventually(lambda: mirror.holders(key(3)))
    assert mirror.holders(key(1)) == ()
    assert mirror.holders(key(2)) == ()
    assert [worker.epoch for worker in await index.workers()] == [new]


async def test_deregistering_removes_the_worker_and_its_entries(index, info, follow, eventually):
    mirror = follow(index)
    epoch = await index.register(info())
    await index.announce("w1", epoch, [key(1)])
    await eventually(lambda: mirror.holders(key(1)))
    await index.deregister("w1", epoch)
    await eventually(lambda: not mirror.workers())
    assert mirror.holders(key(1)) == ()
    assert await index.workers() == []


async def test_deregistering_an_older_epoch_leaves_the_newer_one(index, new_index, info):
    old = await index.register(info())
    new = await new_index().register(info())
    await index.deregister("w1", old)
    assert [worker.epoch for worker in await index.workers()] == [new]


async def test_a_mirror_started_late_sees_what_was_announced_before(index, new_index, info, follow, eventually):
    epochs = {name: await index.register(info(name)) for name in ("a", "b")}
    await index.announce("a", epochs["a"], [key(n) for n in range(300)])
    await index.announce("b", epochs["b"], [key(n) for n in range(100)])
    await index.announce("a", epochs["a"], [], [key(n) for n in range(200, 300)])
    mirror = follow(new_index())
    await eventually(lambda: mirror.synced)
    assert mirror.longest([key(n) for n in range(300)]) == {"a": 200, "b": 100}
    assert {worker.worker_id: worker.epoch for worker in mirror.workers()} == epochs


async def test_a_following_mirror_sees_additions_removals_and_states(index, new_index, info, follow, eventually):
    mirror = follow(new_index())
    await eventually(lambda: mirror.synced)
    epoch = await index.register(info())
    await index.announce("w1", epoch, [key(1), key(2)], [])
    await index.announce("w1", epoch, [key(3)], [key(1)])
    await eventually(lambda: mirror.holders(key(3)))
    assert mirror.holders(key(1)) == ()
    assert mirror.holders(key(2)) == ("w1",)
    await index.heartbeat("w1", epoch, WorkerState.DRAINING)
    await eventually(lambda: mirror.worker("w1").state is WorkerState.DRAINING)


async def test_a_key_added_and_removed_in_one_call_is_not_held(index, info, follow, eventually):
    mirror = follow(index)
    epoch = await index.register(info())
    await index.announce("w1", epoch, [key(1), key(2)], [key(1)])
    await eventually(lambda: mirror.holders(key(2)))
    assert mirror.holders(key(1)) == ()


async def test_replacing_forgets_what_was_announced_before(index, new_index, info, follow, eventually):
    mirror = follow(index)
    epoch = await index.register(info())
    await index.announce("w1", epoch, [key(1), key(2)])
    await eventually(lambda: mirror.holders(key(2)))
    await index.announce("w1", epoch, [key(2), key(3)], replace=True)
    await eventually(lambda: mirror.holders(key(3)))
    late = follow(new_index())
    await eventually(lambda: late.synced)
    for seen in (mirror, late):
        assert [bool(seen.holders(key(n))) for n in (1, 2, 3)] == [False, True, True]


async def test_entries_of_each_tier_come_go_and_are_replaced(index, new_index, info, follow, eventually):
    chain = [key(n) for n in range(6)]
    live = follow(new_index())
    epoch = await index.register(info())
    await index.announce("w1", epoch, chain[:4])
    await index.announce("w1", epoch, chain[2:], tier=Tier.HOST)
    await index.announce("w1", epoch, chain, tier=Tier.DISK)
    await index.announce("w1", epoch, (), [chain[3]])
    await index.announce("w1", epoch, (), [chain[5]], tier=Tier.HOST)
    await eventually(lambda: live.match(chain) == {"w1": PrefixMatch(3, 2, 1, ready_blocks=3)})
    late = follow(new_index())
    await eventually(lambda: late.synced)
    assert late.match(chain) == live.match(chain)
    assert [late.key_count("w1", tier) for tier in Tier] == [3, 3, 6]
    await index.announce("w1", epoch, chain[:1], tier=Tier.HOST, replace=True)
    await eventually(lambda: live.match(chain) == {"w1": PrefixMatch(0, 1, 0)})
    later = follow(new_index())
    await eventually(lambda: later.synced)
    assert later.match(chain) == live.match(chain)
    await index.deregister("w1", epoch)
    await eventually(lambda: not live.match(chain))


async def test_announcements_larger_than_an_event_arrive_whole(index, new_index, info, follow, eventually, config):
    count = 3 * config.announce_keys_max + 5
    keys = [key(n) for n in range(count)]
    live = follow(new_index())
    await eventually(lambda: live.synced)
    epoch = await index.register(info())
    assert await index.announce("w1", epoch, keys)
    await eventually(lambda: live.key_count("w1") == count)
    late = follow(new_index())
    await eventually(lambda: late.synced)
    assert late.longest(keys) == live.longest(keys) == {"w1": count}


async def test_an_expired_worker_leaves_following_mirrors(index, new_index, info, follow, eventually, config):
    mirror = follow(new_index())
    await eventually(lambda: mirror.synced)
    epoch = await index.register(info())
    await index.announce("w1", epoch, [key(1)])
    await eventually(lambda: mirror.holders(key(1)))
    await eventually(lambda: not mirror.workers(), 3 * config.lease_ttl_s)
    assert mirror.holders(key(1)) == ()


async def test_following_ends_soon_after_it_is_told_to(index, config):
    from prismserve.kv_transfer.index.mirror import Mirror

    stop = asyncio.Event()
    mirror = Mirror()
    task = asyncio.create_task(index.follow(mirror, stop))
    while not mirror.synced:
        await asyncio.sleep(0.01)
    stop.set()
    await asyncio.wait_for(task, 10 * config.poll_interval_s)
    assert not mirror.synced


@pytest.mark.parametrize("worker_id", ["", "a b", "a\n", "x" * 129, "{x}", "a/b"])
async def test_a_worker_id_that_cannot_be_stored_is_refused(index, info, worker_id):
    with pytest.raises(ConfigurationError, match="worker_id") as caught:
        await index.register(info(worker_id))
    assert caught.value.field == "worker_id"


async def test_a_key_of_another_length_is_refused(index, info):
    epoch = await index.register(info())
    with pytest.raises(ConfigurationError, match="31 bytes"):
        await index.announce("w1", epoch, [b"x" * 31])


async def test_an_epoch_out_of_range_is_refused(index, info):
    with pytest.raises(ConfigurationError, match="epoch"):
        await index.register(info(epoch=2**53))


async def test_an_oversized_record_is_refused(index, info):
    with pytest.raises(ConfigurationError, match="the limit is 65536"):
        await index.register(info(endpoint=b"x" * 70_000))
