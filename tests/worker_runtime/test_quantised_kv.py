"""Prefill here, decode there, with KV that lies in memory as codes: what one engine over such a pool would have said."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.types import Role
from prismserve.engine.config import EngineConfig
from prismserve.models.reference.scenes import make_scene

pytestmark = pytest.mark.asyncio(loop_scope="module")
SEED = 10_000_000
KV = "int4"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def worlds(open_world: Callable[[], Any]) -> AsyncIterator[tuple[Any, Any]]:
    """A prefill and a decode worker; and a worker that does both."""
    made = []
    for roles in ((Role.PREFILL, Role.DECODE), (Role.MIXED,)):
        world = open_world()
        for role in roles:
            await world.add(role, engine=EngineConfig(kv_cache_bytes=16 << 20, kv_cache_dtype=KV))
        await world.open_router(kv_format=KV)
        await world.wait_connected(len(roles))
        made.append(world)
    yield made[0], made[1]


async def test_codes_cross_the_wire_and_are_not_rounded_again(worlds: tuple[Any, Any]) -> None:
    apart, together = worlds
    for seed in range(SEED, SEED + 4):
        for _, question, _ in make_scene(seed)[1][:2]:
            there, here = await apart.ask(seed, question), await together.ask(seed, question)
            assert there.token_ids == here.token_ids
            assert there.usage.prefill_worker != there.usage.decode_worker
    layout = apart.workers[0].engine.layout
    assert there.usage.kv_bytes_before == here.usage.kv_bytes_before
    assert there.usage.kv_bytes_before % layout.token_bytes == 0
    assert layout.token_bytes * 256 == layout.layers * 2 * layout.kv_heads * layout.head_dim * 4 * 36
    assert 0 < there.usage.kv_bytes_sent <= there.usage.kv_bytes_before


async def test_a_rounding_codec_takes_numbers_and_the_answer_arrives(worlds: tuple[Any, Any]) -> None:
    apart, _ = worlds
    question = make_scene(SEED + 9)[1][0][1]
    answer = await apart.ask(SEED + 9, question, {"wire": {"codec": "int8"}})
    assert answer.token_ids
    assert answer.usage.attempts == 1
    assert answer.usage.kv_bytes_sent > 0
