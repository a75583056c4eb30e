"""What placement decides by predicted cost changes where work is done and never what is answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.types import Role
from prismserve.kv_transfer.tiers.config import TierConfig
from prismserve.router import policy

pytestmark = pytest.mark.asyncio(loop_scope="module")
SCENE = 10_000_800
QUESTIONS = ("Describe the image.", "How many shapes are there?")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    """One prefill worker, one decode worker."""
    made = open_world()
    for role in (Role.PREFILL, Role.DECODE):
        await made.add(role, tiers=TierConfig(host_bytes=0))
    yield made


async def reopen(world: Any, **settings: Any) -> None:
    """A router with other settings, over workers that remember nothing."""
    if world.router is not None:
        await world.router.stop()
        await world.index.close()
    for worker in world.workers:
        await worker.on_engine(lambda engine: engine.clear_prefix_cache())
        worker.engine.image_cache.clear()
    await world.open_router(**settings)
    await world.wait_connected(2)


async def test_answers_are_the_same_with_and_without_conditional_disaggregation(world: Any) -> None:
    said, reasons = [], []
    for local_prefill in ("short", "cost"):
        await reopen(world, local_prefill=local_prefill, measured_costs=False)
        answers = [await world.ask(SCENE, question) for question in QUESTIONS]
        said.append([answer.token_ids for answer in answers])
        reasons.append(answers[0].usage.route_reason)
        workers = {answers[0].usage.prefill_worker.split("-")[0], answers[0].usage.decode_worker.split("-")[0]}
        assert workers == ({"prefill", "decode"} if local_prefill == "short" else {"decode"})
    assert said[0] == said[1]
    assert reasons == [policy.DISAGGREGATED, policy.LOCAL_FASTER]


async def test_predictions_are_compared_with_what_happened(world: Any) -> None:
    await reopen(world)
    await world.ask(SCENE + 1, QUESTIONS[0])
    first = {name: value for name, value in metrics(world).items() if name.startswith("prismserve:prediction_error")}
    await world.ask(SCENE + 2, QUESTIONS[0])
    second = metrics(world)
    for part in ("encode", "prefill", "first_token"):
        name = f'prismserve:prediction_error{{model_name="reference",part="{part}"}}'
        assert second[name] != first[name]
        assert second[name.replace("error", "ratio_count")] == 2
    assert second['prismserve:route_ways_total{model_name="reference",way="encode_image"}'] == 2


async def test_only_a_request_that_leaves_it_to_the_server_is_compressed_harder(world: Any) -> None:
    await reopen(world, harder_codec="int8", harder_gain_min=1e-6, measured_costs=False)
    left_open = await world.ask(SCENE + 3, QUESTIONS[0])
    explicit = await world.ask(SCENE + 4, QUESTIONS[0], "off")
    assert left_open.usage.compression.wire.name == "int8"
    assert left_open.usage.kv_bytes_sent < 0.35 * left_open.usage.kv_bytes_before
    assert explicit.usage.compression.wire.name == "none"
    assert explicit.usage.kv_bytes_sent == explicit.usage.kv_bytes_before


def metrics(world: Any) -> dict[str, float]:
    lines = world.router.metrics.render().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
