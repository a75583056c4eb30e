"""The index server is harmed while workers serve: every answer stays what it was, and caches are found again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from prismserve.core.types import Role
from tests.chaos.test_index import flushed, frozen, paused, restarted
from tests.chaos.worlds import ask, call_of, kinds, until
from tests.kv_transfer.index.servers import Server, program
from tests.worker_runtime.conftest import World

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]
SCENE = 10_001_200
RECOVERY_S = 10.0


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    made = Server(program("valkey"), tmp_path_factory.mktemp("valkey"))
    made.start()
    yield made
    made.kill()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(server: Server) -> AsyncIterator[World]:
    made = World(server.url, "harmed")
    for role in (Role.PREFILL, Role.DECODE):
        await made.add(role)
    await made.open_router()
    await made.wait_connected(2)
    yield made
    await made.close()


def names(server: Server) -> set[str]:
    replies = server.command("KEYS", "prismserve:{harmed}:*").decode()
    return kinds({line.rpartition("}:")[2] for line in replies.splitlines() if line.startswith("prismserve:")})


def indexed(world: World) -> bool:
    """Whether the router knows of every block and image that the workers hold, in every tier."""
    mirror = world.router.mirror
    return mirror.synced and all(
        mirror.key_count(worker.info.worker_id) == sum(map(len, worker._held_keys().values()))
        for worker in world.workers
    )


@pytest.mark.parametrize("harm", [restarted, flushed, frozen, paused], ids=lambda harm: harm.__name__)
async def test_answers_stay_the_same_and_hits_return_within_ten_seconds(
    world: World,
    server: Server,
    harm: Callable[[Server], Awaitable[None]],
    measured: Callable[..., None],
) -> None:
    first = SCENE + 10 * [restarted, flushed, frozen, paused].index(harm)
    expected, hits = {}, {}
    for scene in range(first, first + 3):
        expected[scene], _ = await ask(world, call_of(scene))
        hits[scene] = (await ask(world, call_of(scene)))[1].cached_tokens
        assert hits[scene] >= 192
    await until(lambda: indexed(world), RECOVERY_S)
    baseline = names(server)
    harming = asyncio.create_task(harm(server))
    asked, slowest_s = 0, 0.0
    while not harming.done() or asked < 6:
        scene = first + asked % 3
        began_s = time.monotonic()
        token_ids, _ = await ask(world, call_of(scene, cache_salt="" if asked % 2 else f"{harm.__name__} {asked}"))
        slowest_s = max(slowest_s, time.monotonic() - began_s)
        assert token_ids == expected[scene]
        asked += 1
    await harming
    back_s = time.monotonic()
    await until(lambda: indexed(world) and names(server) == baseline, RECOVERY_S, "the index did not recover in 10 s")
    recovered_s = time.monotonic() - back_s
    for scene, token_ids in expected.items():
        again, usage = await ask(world, call_of(scene))
        assert again == token_ids
        assert usage.cached_tokens >= 0.9 * hits[scene]
    assert slowest_s < 5
    measured(answers=asked, slowest_s=slowest_s, recovered_s=recovered_s)


async def test_nothing_is_held_afterwards(world: World) -> None:
    for worker in world.workers:
        await until(lambda worker=worker: not worker.sessions.requests and not worker.hub.arena.used_pages)
        worker.engine_loop.call(lambda engine: engine.check_integrity()).result(5)
        assert worker.engine.stats().kv_blocks_used == 0
