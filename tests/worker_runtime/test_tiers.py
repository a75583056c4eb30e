"""What the device has no room for comes back from host memory or a file, checked, instead of being computed again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.types import Role, Tier, WorkerState
from prismserve.kv_transfer.tiers.config import TierConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")
SCENE = 10_000_600
QUESTION = "Describe the image."


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world: Callable[[], Any], tmp_path_factory: Any) -> AsyncIterator[Any]:
    """One worker with tiers below its device."""
    made = open_world()
    folder = tmp_path_factory.mktemp("tier")
    made.tiers = TierConfig(host_bytes=64 << 20, disk_path=str(folder), disk_bytes=32 << 20, restore_confidence=0.5)
    await made.add(Role.MIXED, tiers=made.tiers)
    await made.open_router(measured_costs=False)
    yield made


async def settled(worker: Any) -> None:
    """Wait until everything published has been copied."""
    assert await asyncio.to_thread(worker.tiering.store.drain, 20)


async def forget_device(worker: Any) -> None:
    await worker.on_engine(lambda engine: engine.clear_prefix_cache())
    await worker.on_engine(lambda engine: engine.image_cache.clear())
    assert worker.engine.cached_keys() == []


async def test_a_prefix_that_left_the_device_is_restored_not_prefilled(world: Any) -> None:
    (worker,) = world.workers
    before = await world.ask(SCENE, QUESTION)
    await settled(worker)
    await forget_device(worker)
    after = await world.ask(SCENE, QUESTION)
    assert after.token_ids == before.token_ids
    assert after.usage.cached_tokens >= 192
    assert worker.tiering.restored_tokens >= 192
    stats = worker.stats()
    assert stats.tier_host_blocks >= 12
    assert stats.tier_restored_tokens == worker.tiering.restored_tokens


async def test_the_index_knows_the_tier(world: Any) -> None:
    (worker,) = world.workers
    await forget_device(worker)
    held = worker.tiering.held()
    assert len(held[Tier.HOST]) >= 12
    for _ in range(100):
        if world.router.mirror.key_count(worker.info.worker_id) >= len(held[Tier.HOST]):
            return
        await asyncio.sleep(0.05)
    message = "the router never heard of the blocks in host memory"
    raise AssertionError(message)


async def test_a_flipped_bit_costs_a_recompute_never_an_answer(world: Any) -> None:
    (worker,) = world.workers
    before = await world.ask(SCENE + 1, QUESTION)
    await settled(worker)
    await forget_device(worker)
    host = worker.tiering.store.host
    for slot in host._slots.values():
        host._view(slot)[100] ^= 1
    restored = worker.tiering.restored_tokens
    after = await world.ask(SCENE + 1, QUESTION)
    assert after.token_ids == before.token_ids
    assert worker.tiering.restored_tokens == restored
    assert worker.stats().tier_corrupt_blocks > 0


async def test_a_restarted_worker_finds_the_blocks_of_the_one_before(open_world: Any, tmp_path: Any) -> None:
    world = open_world()
    tiers = TierConfig(host_bytes=0, disk_path=str(tmp_path), disk_bytes=32 << 20, restore_confidence=0.5)
    first = await world.add(Role.MIXED, tiers=tiers)
    await world.open_router(measured_costs=False)
    before = await world.ask(SCENE + 2, QUESTION)
    await settled(first)
    world.workers.remove(first)
    await first.stop()
    second = await world.add(Role.MIXED, tiers=tiers)
    await world.wait_connected(1)
    after = await world.ask(SCENE + 2, QUESTION)
    assert after.token_ids == before.token_ids
    assert second.tiering.restored_tokens >= 192


async def test_a_peer_is_sent_blocks_and_images_that_lie_in_host_memory(open_world: Any) -> None:
    world = open_world()
    tiers = TierConfig(host_bytes=64 << 20, restore_confidence=0.5)
    holder = await world.add(Role.MIXED, tiers=tiers)
    await world.open_router(measured_costs=False)
    before = await world.ask(SCENE + 3, QUESTION)
    await world.ask(SCENE + 5, QUESTION)
    await settled(holder)
    await forget_device(holder)
    other = await world.add(Role.MIXED, tiers=tiers)
    await world.wait_connected(2)
    holder.lease.set_state(WorkerState.DRAINING)
    for _ in range(100):
        states = {session.info.worker_id: session.state for session in world.router.pool.sessions}
        if states[holder.info.worker_id] is WorkerState.DRAINING:
            break
        await asyncio.sleep(0.05)
    after = await world.ask(SCENE + 3, QUESTION)
    assert after.usage.decode_worker == other.info.worker_id
    assert after.token_ids == before.token_ids
    assert other.exchange.counters.fetched_blocks >= 12
    # Under another codec only the image can be used.
    fetched, encoded = other.exchange.counters.fetched_embeddings, other.engine.stats().encoded_images
    image = await world.ask(SCENE + 5, QUESTION, {"wire": {"codec": "int8"}})
    assert image.usage.images_cached == 1
    assert other.engine.stats().encoded_images == encoded
    assert other.exchange.counters.fetched_embeddings == fetched + 1


async def test_an_image_that_left_the_device_is_restored_not_encoded(world: Any) -> None:
    (worker,) = world.workers
    await world.ask(SCENE + 4, QUESTION)
    await settled(worker)
    await forget_device(worker)
    encoded, restored = worker.engine.stats().encoded_images, worker.stats().tier_restored_images
    # Under another codec the blocks are others, and the image is the same.
    answer = await world.ask(SCENE + 4, QUESTION, {"wire": {"codec": "int8"}})
    assert worker.stats().tier_restored_images == restored + 1
    assert worker.engine.stats().encoded_images == encoded
    assert answer.usage.images_cached == 1
    worker.engine.image_cache.clear()
    worker.tiering._config = worker.tiering._config.model_copy(update={"images": False})
    plain = await world.ask(SCENE + 4, "How many shapes are there?", {"wire": {"codec": "int4"}})
    assert worker.engine.stats().encoded_images == encoded + 1
    assert plain.usage.images_cached == 0
