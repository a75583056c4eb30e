"""Prefill here, decode there: the answer is what one process would have said, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

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
