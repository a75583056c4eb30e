"""A rolling update between two KV layouts: workers of both live in one cluster and never exchange a block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.errors import IncompatibleLayoutError
from prismserve.core.types import Role
from prismserve.engine.config import EngineConfig
from prismserve.protocol import worker_pb2 as pb
from tests.chaos.worlds import ask, call_of, until

pytestmark = [pytest.mark.chaos, pytest.mark.asyncio(loop_scope="module")]
SCENE = 10_001_100


@dataclass
class Rollout:
    """The same cluster, half of it updated."""

    old: Any
    new: Any


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def rollout(open_world: Callable[[], Any]) -> AsyncIterator[Rollout]:
    old, new = open_world(), open_world()
    new.cluster = old.cluster
    for role in (Role.PREFILL, Role.DECODE):
        await old.add(role)
        await new.add(role, engine=EngineConfig(kv_cache_bytes=48 << 20, kv_cache_dtype="int8"))
    await old.open_router()
    await new.open_router(kv_format="int8")
    await old.wait_connected(2)
    await new.wait_connected(2)
    yield Rollout(old, new)


def ids(world: Any) -> set[str]:
    return {worker.info.worker_id for worker in world.workers}


async def test_each_router_uses_workers_of_its_own_layout_alone(rollout: Rollout) -> None:
    for _ in range(2):
        for scene in range(SCENE, SCENE + 4):
            answers = await asyncio.gather(ask(rollout.old, call_of(scene)), ask(rollout.new, call_of(scene)))
            for world, (token_ids, usage) in zip((rollout.old, rollout.new), answers, strict=True):
                assert token_ids
                assert usage.attempts == 1
                assert {usage.prefill_worker, usage.decode_worker} <= ids(world)
    for world in (rollout.old, rollout.new):
        assert {session.info.worker_id for session in world.router.pool.sessions} == ids(world)


async def test_their_blocks_have_no_key_in_common(rollout: Rollout) -> None:
    """So not even a hint of the index can lead from one to the other."""
    keys = []
    for world in (rollout.old, rollout.new):
        held: set[bytes] = set()
        for worker in world.workers:
            held |= set(await worker.on_engine(lambda engine: engine.cached_keys()))
        assert len(held) > 10
        keys.append(held)
    assert not keys[0] & keys[1]
    # Both routers hear everybody's announcements, and find nobody of the other layout by a key of their own.
    for world, own, strangers in ((rollout.old, keys[0], rollout.new), (rollout.new, keys[1], rollout.old)):
        for worker in strangers.workers:
            await until(lambda world=world, worker=worker: world.router.mirror.key_count(worker.info.worker_id) > 10)
        for key in own:
            assert not set(world.router.mirror.longest([key])) & ids(strangers)


@pytest.mark.parametrize("towards", ["old", "new"])
async def test_a_worker_that_asks_across_is_refused_with_both_sides_named(rollout: Rollout, towards: str) -> None:
    mine, theirs = (rollout.old, rollout.new) if towards == "new" else (rollout.new, rollout.old)
    asker, holder = mine.workers[0], theirs.workers[0]
    peer = await asker.peers.find(holder.info.worker_id)
    message = pb.PushRequest(
        target_worker=asker.info.worker_id,
        target_epoch=asker.info.epoch,
        source_epoch=holder.info.epoch,
        layout_fingerprint=asker.engine.layout.fingerprint(),
        block_keys=b"".join(holder.engine.cached_keys()[:4]),
    )
    reply = await peer.push(message, 5.0)
    assert not reply.found
    assert asker.info.worker_id in reply.refusal
    assert holder.info.worker_id in reply.refusal
    with pytest.raises(IncompatibleLayoutError):
        await holder.exchange.serve(message)


async def test_nothing_was_exchanged_or_held(rollout: Rollout) -> None:
    for world in (rollout.old, rollout.new):
        for worker in world.workers:
            worker.engine_loop.call(lambda engine: engine.check_integrity()).result(5)
            assert worker.hub.arena.used_pages == 0
            assert worker.exchange.counters.fetched_blocks == 0
            assert worker.engine.stats().kv_blocks_used == 0
