"""A worker's presence through losses of the index."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from prismserve.core.types import Tier, WorkerState
from prismserve.kv_transfer.index.events import EventKind
from prismserve.kv_transfer.index.lease import WorkerLease
from prismserve.kv_transfer.index.memory import MemoryIndex, MemoryStore


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


@pytest.fixture
async def lease(config):
    """Start leases that are stopped at the end."""
    leases = []

    async def start(index, info, held, epochs=None):
        by_tier = held if isinstance(held, dict) else {Tier.DEVICE: held}
        made = WorkerLease(
            index,
            info,
            lambda: {tier: sorted(keys) for tier, keys in by_tier.items()},
            config,
            epochs.append if epochs is not None else None,
        )
        leases.append(made)
        await made.start()
        return made

    yield start
    for made in leases:
        await made.stop()


async def test_a_lease_announces_what_is_held_and_what_changes(index, new_index, info, follow, eventually, lease):
    mirror = follow(new_index())
    # Kept up to date, since a lease that was lost announces all that is held.
    held = {key(1)}
    worker = await lease(index, info(), held)
    await eventually(lambda: mirror.holders(key(1)))
    held ^= {key(1), key(2), key(3)}
    worker.changed([key(2), key(3)], [key(1)])
    await eventually(lambda: mirror.holders(key(3)))
    assert mirror.holders(key(1)) == ()
    worker.changed([key(4)], [])
    worker.changed([], [key(4)])
    held.add(key(5))
    worker.changed([key(5)], [])
    await eventually(lambda: mirror.holders(key(5)))
    assert mirror.holders(key(4)) == ()


async def test_a_block_that_moves_between_tiers_is_never_missing(index, new_index, info, follow, eventually, lease):
    mirror = follow(new_index())
    held = {Tier.DEVICE: {key(1)}, Tier.HOST: set(), Tier.DISK: set()}
    worker = await lease(index, info(), held)
    await eventually(lambda: mirror.tiers(key(1)))
    seen = []
    mirror_apply = mirror.apply

    def apply(event):
        applied = mirror_apply(event)
        if event.kind is EventKind.ANNOUNCE:
            seen.append(mirror.tiers(key(1)))
        return applied

    mirror.apply = apply
    for source, target in ((Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DISK), (Tier.DISK, Tier.DEVICE)):
        held[source].discard(key(1))
        held[target].add(key(1))
        worker.changed([], [key(1)], source)
        worker.changed([key(1)], [], target)
        await eventually(lambda target=target: mirror.tiers(key(1)) == {"w1": target})
        await eventually(lambda: mirror.key_count("w1") == 1)
    assert all(seen)


async def test_a_lease_outlives_its_ttl_and_ends_when_stopped(index, new_index, info, config, lease):
    worker = await lease(index, info(), set())
    await asyncio.sleep(1.5 * config.lease_ttl_s)
    assert worker.registered
    assert [found.epoch for found in await new_index().workers()] == [worker.info.epoch]
    await worker.stop()
    assert await new_index().workers() == []


async def test_a_new_state_is_published_at_once(index, new_index, info, lease, follow, eventually):
    mirror = follow(new_index())
    worker = await lease(index, info(), set())
    worker.set_state(WorkerState.DRAINING)
    await eventually(lambda: mirror.worker("w1") and mirror.worker("w1").state is WorkerState.DRAINING)


async def test_a_dropped_worker_comes_back_under_a_new_epoch_with_everything(
    index, new_index, info, follow, eventually, lease
):
    mirror = follow(new_index())
    epochs = []
    await lease(index, info(), {key(1)}, epochs)
    await eventually(lambda: mirror.holders(key(1)))
    await new_index().drop_worker("w1")
    await eventually(lambda: len(epochs) == 2 and mirror.holders(key(1)))
    assert epochs[1] > epochs[0]
    assert mirror.worker("w1").epoch == epochs[1]


@pytest.mark.parametrize("fault", ["flush", "restart", "freeze"])
async def test_a_lost_index_is_rebuilt_under_the_same_epoch(
    server, redis_index, info, follow, eventually, lease, fault, config
):
    mirror = follow(redis_index(server))
    held = {key(n) for n in range(50)}
    epochs = []
    worker = await lease(redis_index(server), info(), held, epochs)
    await eventually(lambda: mirror.key_count("w1") == 50)
    if fault == "flush":
        server.command("FLUSHALL")
    elif fault == "restart":
        server.kill()
        await eventually(lambda: not worker.registered)
    else:
        server.freeze()
        await eventually(lambda: not worker.registered)
    added, removed = {key(100)}, {key(0)}
    held |= added
    held -= removed
    worker.changed(added, removed)
    if fault == "restart":
        server.start()
    elif fault == "freeze":
        await asyncio.sleep(config.lease_ttl_s)
        server.thaw()
    await eventually(lambda: mirror.synced and mirror.holders(key(100)) and mirror.key_count("w1") == 50)
    assert mirror.holders(key(0)) == ()
    assert epochs == [worker.info.epoch]


async def test_a_worker_frozen_beyond_its_lease_is_fenced(info, config, eventually):
    clock = [0.0]
    store = MemoryStore(lambda: clock[0])
    index = MemoryIndex(store, config, lambda: clock[0])
    epochs = []
    worker = WorkerLease(index, info(), dict, config, epochs.append)
    await worker.start()
    clock[0] += 30.0
    await eventually(lambda: len(epochs) == 2)
    assert epochs[1] > epochs[0]
    await worker.stop()
