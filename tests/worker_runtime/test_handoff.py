"""Prefill here, decode there: the answer is what one process would have said, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from prismserve.core.errors import InvalidRequestError
from prismserve.core.types import Role
from prismserve.models.reference import reference_path
from prismserve.models.reference.scenes import make_scene

pytestmark = pytest.mark.asyncio(loop_scope="module")
SEED = 10_000_000


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    """One prefill worker, one decode worker."""
    made = open_world()
    await made.add(Role.PREFILL)
    await made.add(Role.DECODE)
    await made.open_router()
    await made.wait_connected(2)
    yield made


@pytest.fixture(scope="module")
def transformers_says() -> Callable[[int, str], str]:
    """Greedy generation by transformers in float32."""
    processor = AutoProcessor.from_pretrained(reference_path())
    model = LlavaForConditionalGeneration.from_pretrained(reference_path(), dtype=torch.float32).eval()

    def say(seed: int, question: str) -> list[int]:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
        inputs = processor(images=make_scene(seed)[0], text=prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
        return ids.tolist()

    return say


async def test_greedy_tokens_of_50_images_times_3_questions_equal_transformers(
    world: Any, transformers_says: Any
) -> None:
    for seed in range(SEED, SEED + 50):
        for _, question, _ in make_scene(seed)[1][:3]:
            answer = await world.ask(seed, question)
            assert answer.token_ids == transformers_says(seed, question)
            assert answer.usage.attempts == 1


async def test_prefill_and_decode_are_done_by_different_workers_over_nixl(world: Any) -> None:
    answer = await world.ask(SEED + 50, "Describe the image.")
    assert answer.usage.prefill_worker.startswith("prefill-")
    assert answer.usage.decode_worker.startswith("decode-")
    assert answer.usage.transport == "nixl"
    assert answer.usage.kv_bytes_sent == answer.usage.kv_bytes_before > 0


async def test_compression_cuts_tokens_and_bytes_on_the_wire(world: Any) -> None:
    plan = {"visual": {"method": "visionzip", "keep": 49}, "wire": {"codec": "int8"}}
    answer = await world.ask(SEED + 51, "Describe the image.", plan)
    usage = answer.usage
    assert (usage.visual_tokens_before, usage.visual_tokens_after) == (196, 49)
    assert usage.kv_bytes_after < usage.kv_bytes_before * 0.32
    assert usage.kv_bytes_sent < usage.kv_bytes_after * 0.35


async def test_text_and_the_last_tokens_cross_the_wire_exactly_beside_an_int4_image(world: Any) -> None:
    exact = {"wire": {"codec": "int4", "text": "none", "residual": 16}}
    answer = await world.ask(SEED + 53, "Describe the image.", exact)
    assert answer.usage.kv_bytes_sent < answer.usage.kv_bytes_before * 0.3
    all_of_it = {"wire": {"codec": "int4", "text": "same", "residual": 0}}
    smaller = await world.ask(SEED + 54, "Describe the image.", all_of_it)
    assert smaller.usage.kv_bytes_sent < answer.usage.kv_bytes_sent


async def test_a_second_question_neither_encodes_nor_prefills_the_image_again(world: Any) -> None:
    encoded = sum(worker.engine.stats().encoded_images for worker in world.workers)
    await world.ask(SEED + 52, "Describe the image.")
    again = await world.ask(SEED + 52, "How many shapes are there?")
    assert sum(worker.engine.stats().encoded_images for worker in world.workers) == encoded + 1
    assert again.usage.images_cached == 1
    assert again.usage.cached_tokens >= 192


async def test_eight_at_once_say_what_they_say_one_by_one(world: Any) -> None:
    questions = [(SEED + 60 + i, make_scene(SEED + 60 + i)[1][0][1]) for i in range(8)]
    together = await asyncio.gather(*(world.ask(seed, question) for seed, question in questions))
    for (seed, question), answer in zip(questions, together, strict=True):
        assert (await world.ask(seed, question)).token_ids == answer.token_ids


async def test_nothing_is_held_when_all_is_said(world: Any) -> None:
    await asyncio.gather(*(world.ask(SEED + 70 + i, "Describe the image.") for i in range(4)))
    await asyncio.sleep(0.3)
    for worker in world.workers:
        worker.engine_loop.call(lambda engine: engine.check_integrity()).result(5)
        stats = worker.engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert worker.hub.arena.used_pages == 0
        assert worker.hub.arena.used_staging_pages == 0
        assert worker.sessions.requests == 0


async def test_a_handoff_does_not_wait_for_the_engine_that_prefilled(world: Any, monkeypatch: Any) -> None:
    def asked(*_: Any) -> None:
        message = "the engine may be in a step for somebody else"
        raise AssertionError(message)

    monkeypatch.setattr(world.workers[0].engine, "export_view", asked)
    answer = await world.ask(SEED + 76, "Describe the image.")
    assert answer.usage.attempts == 1
    assert 0.0 < answer.usage.transfer_exposed_ms < answer.usage.ttft_ms


async def test_kv_that_does_not_fit_its_request_is_refused_and_frees_what_it_held(world: Any, monkeypatch: Any) -> None:
    engine = world.workers[1].engine
    accepts, refused = engine.import_accepts, []

    def once(ticket: Any, layer_tokens: Any) -> bool:
        if refused:
            return bool(accepts(ticket, layer_tokens))
        refused.append(layer_tokens)
        return False

    monkeypatch.setattr(engine, "import_accepts", once)
    answer = await world.ask(SEED + 77, "Describe the image.")
    assert len(refused) == 1
    assert answer.usage.attempts == 2
    await test_nothing_is_held_when_all_is_said(world)


async def test_a_cancelled_stream_frees_everything(world: Any) -> None:
    task = asyncio.create_task(world.ask(SEED + 80, "Describe the image.", ignore_eos=True, max_tokens=1500))
    await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for _ in range(50):
        await asyncio.sleep(0.05)
        if all(worker.engine.stats().running == 0 for worker in world.workers):
            break
    await test_nothing_is_held_when_all_is_said(world)


async def test_stop_strings_and_sampling_cross_the_handoff(world: Any) -> None:
    whole = await world.ask(SEED + 51, "Describe the image.")
    cut = await world.ask(SEED + 51, "Describe the image.", stop=[whole.text.split()[1]])
    assert cut.text.strip() == whole.text.split()[0]
    sampled = [await world.ask(SEED + 51, "Describe the image.", temperature=1.5, seed=7) for _ in range(2)]
    assert sampled[0].token_ids == sampled[1].token_ids


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer", "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "scene", "schema": SCHEMA}}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_a_json_schema_holds_from_the_first_token_across_the_handoff(world: Any, temperature: float) -> None:
    options = {"response_format": FORMAT, "temperature": temperature, "seed": 11, "max_tokens": 100, "logprobs": True}
    answer = await world.ask(SEED + 90, "Describe the image.", **options, top_logprobs=2)
    value = json.loads(answer.text)
    assert list(value) == ["colour", "count"]
    assert answer.usage.prefill_worker.startswith("prefill-")
    assert answer.usage.attempts == 1
    assert answer.text[0] == "{"
    assert len(answer.logprobs) == len(answer.token_ids)
    for entry in answer.logprobs:
        assert entry.logprob <= entry.top[0][1] <= 0
        assert math.exp(entry.top[0][1]) + math.exp(entry.top[1][1]) <= 1.0001
    again = await world.ask(SEED + 90, "Describe the image.", **options)
    assert again.token_ids == answer.token_ids


async def test_logprobs_of_the_first_token_are_those_a_single_worker_gives(world: Any) -> None:
    seen = await world.ask(SEED + 91, "Describe the image.", logprobs=True, top_logprobs=3)
    alone = await world.ask(SEED + 91, "Describe the image.", logprobs=True, top_logprobs=3, n=2)
    for entry, other in zip(seen.logprobs, alone.logprobs, strict=True):
        assert [token for token, _ in entry.top] == [token for token, _ in other.top]
        assert math.isclose(entry.logprob, other.logprob, abs_tol=1e-3)


async def test_several_answers_prefill_and_move_the_prompt_once(world: Any) -> None:
    prefill, decode = world.workers[:2]
    before = prefill.exchange.counters.transfers, decode.engine.stats().prefill_tokens
    options = {"temperature": 2.0, "seed": 5, "n": 4}
    answer = await world.ask(SEED + 92, "Describe the image.", **options)
    assert len(answer.others) == 3
    assert len({tuple(ids) for ids in (answer.token_ids, *answer.others.values())}) > 1
    assert prefill.exchange.counters.transfers == before[0] + 1
    # The others share the full blocks and the image, and compute the last, partial block at most.
    assert decode.engine.stats().prefill_tokens - before[1] <= 3 * 16
    again = await world.ask(SEED + 92, "Describe the image.", **options)
    assert (again.token_ids, again.others) == (answer.token_ids, answer.others)


@pytest.mark.parametrize(
    "constraint",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wizard"}}}},
        {"guided_json": {"type": "integer", "multipleOf": 99_999_999, "minimum": 3, "maximum": 10**18}},
        {"guided_regex": "("},
    ],
)
async def test_a_schema_bomb_is_the_callers_error_and_leaves_nothing_behind(world: Any, constraint: Any) -> None:
    with pytest.raises(InvalidRequestError, match="constraint"):
        await world.ask(SEED + 93, "Describe the image.", **constraint)
    await test_nothing_is_held_when_all_is_said(world)
