"""What one worker computed, another one fetches instead of computing it again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.types import Role, WorkerState

pytestmark = pytest.mark.asyncio(loop_scope="module")
SCENE = 10_000_200


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    """Two workers that do everything, so that the second can be made to answer what the first has seen."""
    made = open_world()
    await made.add(Role.MIXED)
    await made.add(Role.MIXED)
    await made.open_router(measured_costs=False)
    await made.wait_connected(2)
    yield made


def sessions(world: Any) -> dict[str, Any]:
    return {session.info.worker_id: session for session in world.router.pool.sessions}


async def announced(world: Any, worker: Any, count: int) -> None:
    """Wait until the router's mirror knows ``count`` keys of a worker."""
    for _ in range(100):
        if world.router.mirror.key_count(worker.info.worker_id) >= count:
            return
        await asyncio.sleep(0.05)
    message = f"only {world.router.mirror.key_count(worker.info.worker_id)} keys were announced"
    raise AssertionError(message)


async def test_a_prefix_computed_by_another_worker_is_pulled_not_prefilled(world: Any) -> None:
    first, second = world.workers
    await world.ask(SCENE, "Describe the image.")
    holder = first if first.engine.cached_keys() else second
    other = second if holder is first else first
    await announced(world, holder, 12)
    encoded = other.engine.stats().encoded_images
    # Draining keeps its caches reachable and sends new requests elsewhere.
    holder.lease.set_state(WorkerState.DRAINING)
    try:
        for _ in range(100):
            if sessions(world)[holder.info.worker_id].state is WorkerState.DRAINING:
                break
            await asyncio.sleep(0.05)
        answer = await world.ask(SCENE, "How many shapes are there?")
        assert answer.usage.decode_worker == other.info.worker_id
        assert answer.usage.cached_tokens >= 192
        assert other.exchange.counters.fetched_blocks >= 12
        assert other.engine.stats().encoded_images == encoded
    finally:
        holder.lease.set_state(WorkerState.READY)
    holder_says = await world.ask(SCENE, "How many shapes are there?")
    assert holder_says.token_ids == answer.token_ids


async def test_a_hint_that_is_stale_costs_a_miss_never_the_request(world: Any) -> None:
    first, second = world.workers
    await world.ask(SCENE + 1, "Describe the image.")
    keys_before = {worker.info.worker_id: len(worker.engine.cached_keys()) for worker in world.workers}
    holder = max((first, second), key=lambda worker: len(worker.engine.cached_keys()))
    other = second if holder is first else first
    await announced(world, holder, keys_before[holder.info.worker_id])
    # The index goes on believing in blocks that are gone.
    holder._held.clear()
    holder.lease.changed = lambda added, removed: None
    await holder.on_engine(lambda engine: engine.clear_prefix_cache())
    holder.lease.set_state(WorkerState.DRAINING)
    try:
        for _ in range(100):
            if sessions(world)[holder.info.worker_id].state is WorkerState.DRAINING:
                break
            await asyncio.sleep(0.05)
        misses = other.exchange.counters.fetch_misses
        answer = await world.ask(SCENE + 1, "How many shapes are there?")
        assert answer.usage.decode_worker == other.info.worker_id
        assert answer.usage.attempts == 1
        assert other.exchange.counters.fetch_misses >= misses
    finally:
        del holder.lease.changed
        holder.lease.set_state(WorkerState.READY)


async def test_all_pins_and_leases_end(world: Any) -> None:
    await asyncio.sleep(0.3)
    for worker in world.workers:
        worker.engine_loop.call(lambda engine: engine.check_integrity()).result(5)
        assert worker.hub.arena.used_pages == 0
        assert worker.engine.stats().running == 0
