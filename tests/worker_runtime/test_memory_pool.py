"""Every operation of the pool does what its page says, on real workers, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.errors import EngineError, TransferError
from prismserve.core.prompt import block_keys, elements
from prismserve.core.types import Role
from prismserve.kv_transfer.index.mirror import PrefixMatch
from prismserve.kv_transfer.tiers.config import TierConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")
SCENE = 10_000_900
QUESTION = "Describe the image."


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    """Two workers with host memory; the request that was asked last is noted on its way to the first."""
    made = open_world()
    for _ in range(2):
        worker = await made.add(Role.MIXED, tiers=TierConfig(host_bytes=32 << 20))
        note(made, worker)
    await made.open_router(measured_costs=False)
    await made.wait_connected(2)
    yield made


def note(world: Any, worker: Any) -> None:
    submit = worker.engine.submit

    def noted(request: Any, **more: Any) -> None:
        world.request, world.server = request, worker
        submit(request, **more)

    worker.engine.submit = noted


async def computed(world: Any, scene: int) -> tuple[Any, Any, Any, list[bytes]]:
    """Ask about a scene: who computed it, the other worker, the request, and its full blocks without the answer's."""
    answer = await world.ask(scene, QUESTION)
    server = world.server
    (other,) = (worker for worker in world.workers if worker is not server)
    request = world.request
    keys = list(block_keys(request.wire_namespace, elements(request.prompt), 16))
    spoken = block_keys(request.wire_namespace, elements(request.prompt, answer.token_ids), 16)[len(keys) :]
    await server.memory_pool.delete(spoken)
    return server, other, request, keys


async def test_match_says_what_lies_where_as_it_moves(world: Any) -> None:
    server, _, request, keys = await computed(world, SCENE)
    pool, count = server.memory_pool, len(keys)
    assert await pool.match(keys) == PrefixMatch(count, 0, 0, count)
    assert await pool.swap_out(keys) == count
    assert await pool.match(keys) == PrefixMatch(0, count, 0, 0)
    assert await pool.swap_in(request) == 16 * count
    assert await pool.match(keys) == PrefixMatch(count, 0, 0, count)
    assert await pool.delete(keys) == count
    assert await pool.match(keys) == PrefixMatch()
    server.engine.check_integrity()


async def test_what_is_pinned_stays_on_the_device(world: Any) -> None:
    server, _, _, keys = await computed(world, SCENE + 1)
    async with server.memory_pool.pin(keys) as pinned:
        assert pinned.tokens == 16 * len(keys)
        assert await server.memory_pool.delete(keys) == 0
        assert await server.memory_pool.swap_out(keys) == 0
        assert (await server.memory_pool.match(keys)).ready_blocks == len(keys)
    assert await server.memory_pool.delete(keys) == len(keys)
    assert server.engine.pool.used_groups == 0


async def test_transfer_brings_blocks_from_anothers_device_or_tiers(world: Any) -> None:
    server, other, request, keys = await computed(world, SCENE + 2)
    source = server.info.worker_id
    assert await other.memory_pool.transfer(request, source, 5) == 80
    await server.memory_pool.swap_out(keys)
    assert await other.memory_pool.transfer(request, source, len(keys)) == 16 * len(keys) - 80
    assert (await other.memory_pool.match(keys)).ready_blocks == len(keys)
    await server.memory_pool.delete(keys)
    await other.memory_pool.delete(keys)
    with pytest.raises(TransferError, match="does not hold"):
        await other.memory_pool.transfer(request, source, len(keys))
    assert other.engine.pool.used_groups == server.engine.pool.used_groups == 0


async def test_allocated_blocks_are_found_once_they_are_inserted_and_not_before(world: Any) -> None:
    server, other, request, keys = await computed(world, SCENE + 3)
    pool = other.memory_pool
    ticket = await pool.allocate(request, 4)
    assert (await pool.match(keys)).blocks == 0
    assert other.engine.pool.used_groups == 4
    write = other.engine.import_writer(ticket)
    async with server.memory_pool.pin(keys[:4]) as pinned:
        for layer in range(other.engine.layout.layers):
            write(layer, 0, *server.engine.pool.read(layer, pinned.table, 0, pinned.tokens))
    await pool.insert(ticket, request)
    assert (await pool.match(keys)).ready_blocks == 4
    with pytest.raises(EngineError, match="ended already"):
        await pool.insert(ticket, request)
    unused = await pool.allocate(request, 8)
    await pool.free(unused)
    await pool.free(unused)
    other.engine.check_integrity()
    assert other.engine.pool.used_groups == 0
