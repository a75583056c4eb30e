"""What one tenant can learn of another's caches, and what it can take from it, with a real worker."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.types import Role
from prismserve.engine.config import EngineConfig
from prismserve.router.generation import TextDelta
from prismserve.router.tenants import Tenant
from tests.chaos.worlds import ask, call_of, stream

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]
SCENE = 10_001_700
PROBES = 24
VICTIM, PROBER = Tenant("victim", None, 0.5), Tenant("prober", None, 0.5)
ONE_TOKEN = {"options": {"max_tokens": 1}}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    """One worker with room for about eight conversations over one picture each."""
    made = open_world()
    await made.add(Role.MIXED, engine=EngineConfig(kv_cache_bytes=11 << 20, max_model_len=1024, image_cache_bytes=0))
    await made.open_router()
    yield made


async def ttft_s(world: Any, scene: int, tenant: Tenant) -> float:
    began_s = time.perf_counter()
    async for event in stream(world, call_of(scene, tenant=tenant, **ONE_TOKEN)):
        if isinstance(event, TextDelta):
            return time.perf_counter() - began_s
    message = "an answer without a token"
    raise AssertionError(message)


def told_apart(warm: list[float], cold: list[float]) -> float:
    """Share of pairs in which the warm one was faster (area under the ROC curve): 0.5 is chance, 1 is certainty."""
    return statistics.fmean((one < other) + 0.5 * (one == other) for one in warm for other in cold)


async def probe(world: Any, first: int, tenant: Tenant) -> float:
    """How well ``tenant`` tells scenes that the victim has just asked about from those that nobody has, by TTFT."""
    warm, cold = [], []
    order = [True, False] * PROBES
    random.Random(first).shuffle(order)
    for number, asked in enumerate(order):
        scene = first + number
        if asked:
            await ask(world, call_of(scene, tenant=VICTIM, **ONE_TOKEN))
        else:
            # The same work for the machine, about another picture.
            await ask(world, call_of(first + 1000 + number, tenant=VICTIM, **ONE_TOKEN))
        (warm if asked else cold).append(await ttft_s(world, scene, tenant))
    return told_apart(warm, cold)


async def test_time_to_first_token_tells_a_tenant_nothing_of_anothers_cache(world: Any) -> None:
    assert await probe(world, SCENE, VICTIM) > 0.9, "the probe works: it sees its own tenant's cache"
    # With 24 of each, chance stays within 0.5 +- 0.25 in all but one of a thousand runs.
    assert 0.25 < await probe(world, SCENE + 100, PROBER) < 0.75


async def test_the_usage_report_tells_nothing_of_anothers_cache(world: Any) -> None:
    await ask(world, call_of(SCENE + 300, tenant=VICTIM))
    _, own = await ask(world, call_of(SCENE + 300, tenant=VICTIM))
    # One that has asked nothing yet: what is cached of its own requests, were it the beginning of a chat, it may find.
    _, other = await ask(world, call_of(SCENE + 300, tenant=Tenant("stranger", None, 0.5)))
    assert own.cached_tokens >= 192
    assert (other.cached_tokens, other.images_cached) == (0, 0)


async def hit_rate(world: Any, first: int, *, flooded: bool) -> float:
    """Of prompts about two pictures asked in turn by the victim, the share of tokens found in the cache."""
    hit = asked = 0
    for number in range(16):
        _, usage = await ask(world, call_of(first + number % 2, tenant=VICTIM))
        if number >= 2:
            hit, asked = hit + usage.cached_tokens, asked + usage.prompt_tokens
        for more in range(5 if flooded else 0):
            await ask(world, call_of(first + 1000 + 5 * number + more, tenant=PROBER, **ONE_TOKEN))
    return hit / asked


async def test_a_tenant_that_floods_the_cache_leaves_another_nine_tenths_of_its_hits(world: Any) -> None:
    alone = await hit_rate(world, SCENE + 400, flooded=False)
    assert alone > 0.8
    assert await hit_rate(world, SCENE + 2000, flooded=True) >= 0.9 * alone
    (worker,) = world.workers
    assert worker.engine.stats().kv_blocks_total < 9 * 14, "the flood does not fit"
