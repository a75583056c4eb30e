"""Visual tokens that leave between layers: a prefill worker and a decode worker say what one worker alone says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.errors import InvalidRequestError
from prismserve.core.types import Role
from prismserve.models.reference.scenes import make_scene

pytestmark = pytest.mark.asyncio(loop_scope="module")
SEED = 10_000_300
LAYERS, TOKEN_LAYER_BYTES = 6, 2 * 2 * 64 * 4


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair(open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    """A prefill worker and a decode worker."""
    made = open_world()
    await made.add(Role.PREFILL)
    await made.add(Role.DECODE)
    await made.open_router()
    await made.wait_connected(2)
    yield made


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def alone(open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    """One worker that does both."""
    made = open_world()
    await made.add(Role.MIXED)
    await made.open_router()
    await made.wait_connected(1)
    yield made


PLANS = [
    {"prefill": {"method": "fastv", "keep": 0.25}},
    {"prefill": {"method": "random", "keep": 49, "layer": 0}},
    {"visual": {"method": "visionzip", "keep": 98}, "prefill": {"method": "fastv", "keep": 24, "layer": 3}},
    {"prefill": "fastv", "wire": "int8"},
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
async def test_a_handoff_answers_as_the_colocated_run_token_for_token(pair: Any, alone: Any, plan: Any) -> None:
    exact = {**plan, "wire": "none"}
    for seed in range(SEED, SEED + 3):
        question = make_scene(seed)[1][0][1]
        split = await pair.ask(seed, question, plan)
        assert split.usage.prefill_worker.startswith("prefill-")
        assert split.usage.decode_worker.startswith("decode-")
        if "wire" not in plan:
            assert split.token_ids == (await alone.ask(seed, question, exact)).token_ids


async def test_usage_counts_what_is_left_and_only_that_crosses_the_wire(pair: Any) -> None:
    answer = await pair.ask(SEED + 10, "Describe the image.", {"prefill": {"method": "fastv", "keep": 49}})
    usage = answer.usage
    assert (usage.visual_tokens_before, usage.visual_tokens_after, usage.visual_tokens_by_cut) == (196, 49, (49,))
    text = usage.prompt_tokens - 196
    slots = 2 * (text + 196) + 4 * (text + 49)
    assert usage.kv_bytes_after == usage.kv_bytes_sent == slots * TOKEN_LAYER_BYTES
    assert usage.kv_bytes_before == LAYERS * usage.prompt_tokens * TOKEN_LAYER_BYTES


async def test_plans_never_share_a_cache(pair: Any) -> None:
    off = await pair.ask(SEED + 11, "Describe the image.")
    assert (await pair.ask(SEED + 11, "Describe the image.")).usage.cached_tokens >= 192
    pruned = [await pair.ask(SEED + 11, "Describe the image.", {"prefill": "fastv"}) for _ in range(2)]
    assert [answer.usage.cached_tokens for answer in pruned] == [0, 0]
    assert pruned[0].token_ids == pruned[1].token_ids
    assert (await pair.ask(SEED + 11, "Describe the image.")).token_ids == off.token_ids


async def test_requests_of_different_plans_do_not_disturb_each_other(pair: Any) -> None:
    plans = [None, *PLANS[:3], None]
    asked = [(SEED + 20 + i, make_scene(SEED + 20 + i)[1][0][1], plan) for i, plan in enumerate(plans)]
    together = await asyncio.gather(*(pair.ask(*one) for one in asked))
    for one, answer in zip(asked, together, strict=True):
        assert (await pair.ask(*one)).token_ids == answer.token_ids


async def test_a_layer_the_model_lacks_is_the_callers_error(pair: Any) -> None:
    with pytest.raises(InvalidRequestError, match="between 1 and 5") as caught:
        await pair.ask(SEED, "Describe the image.", {"prefill": {"method": "fastv", "layer": 6}})
    assert caught.value.field == "compression.prefill.layer"


async def test_nothing_is_held_when_all_is_said(pair: Any) -> None:
    await asyncio.sleep(0.3)
    for worker in pair.workers:
        worker.engine_loop.call(lambda engine: engine.check_integrity()).result(5)
        stats = worker.engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert len(worker.engine.pool.slab) == 0
        assert worker.hub.arena.used_pages == 0
