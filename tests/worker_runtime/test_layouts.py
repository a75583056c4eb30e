"""Workers whose KV layouts differ: another block size is converted, another format is refused with both sides named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from prismserve.compression.presets import resolve
from prismserve.core.types import FinishReason, Prompt, Request, Role, SamplingParams, TextSegment
from prismserve.engine.config import EngineConfig
from prismserve.protocol import worker_pb2 as pb
from prismserve.worker_runtime.jobs import Submission

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT_TOKENS, NEW_TOKENS = 75, 12


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    """A prefill worker with blocks of 16 tokens, one with a quantised pool, and a decode worker with blocks of 64."""
    made = open_world()
    await made.add(Role.PREFILL)
    await made.add(Role.PREFILL, engine=EngineConfig(kv_cache_bytes=48 << 20, kv_cache_dtype="int8"))
    await made.add(Role.DECODE, engine=EngineConfig(kv_cache_bytes=48 << 20, block_tokens=64))
    yield made


def request(name: str, codec: str) -> Request:
    plan = resolve({"wire": {"codec": codec, "text": "same", "residual": 0} if codec != "none" else "none"}, "off")
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    prompt = Prompt((TextSegment(tuple(range(10, 10 + PROMPT_TOKENS))),))
    return Request(name, 0, bytes(32), bytes([codec != "none"]) * 32, prompt, (), sampling, plan)


async def ask(worker: Any, job: int, asked: Request, target: Any = None) -> asyncio.Queue[Any]:
    """Submit as a router does; the session's outbox."""
    session = worker.sessions.open(f"router of {asked.request_id}")
    worker.sessions.adopt(session, (asked.request_id, asked.attempt))
    place = ("", 0) if target is None else (target.info.worker_id, target.info.epoch)
    await worker.handler(job).submit(Submission(asked, job, *place, "", 0, ()))
    return session.outbox


async def answer(outbox: asyncio.Queue[Any]) -> tuple[list[int], str]:
    tokens: list[int] = []
    while True:
        message = await asyncio.wait_for(outbox.get(), 20)
        for output in message.outputs.outputs:
            tokens += output.token_ids
            if output.finish_reason:
                return tokens, output.error if output.finish_reason == FinishReason.ERROR else ""


@pytest.mark.parametrize("codec", ["none", "int8"])
async def test_blocks_of_another_size_are_cut_anew_and_the_answer_is_the_same(world: Any, codec: str) -> None:
    prefill, _, decode = world.workers
    assert prefill.engine.layout.block_tokens != decode.engine.layout.block_tokens
    asked = request(f"handed over {codec}", codec)
    outbox = await ask(decode, pb.JOB_DECODE, asked)
    await ask(prefill, pb.JOB_PREFILL, asked, decode)
    tokens, error = await answer(outbox)
    assert not error
    alone, _ = await answer(await ask(prefill, pb.JOB_LOCAL, request(f"alone {codec}", "none")))
    assert tokens == alone
    assert len(tokens) == NEW_TOKENS
    decode.engine_loop.call(lambda engine: engine.check_integrity()).result(5)
    assert decode.hub.arena.used_pages == 0


async def test_another_format_is_refused_under_an_exact_codec_and_the_error_names_both_sides(world: Any) -> None:
    _, quantised, decode = world.workers
    asked = request("refused", "none")
    await ask(decode, pb.JOB_DECODE, asked)
    _, error = await answer(await ask(quantised, pb.JOB_PREFILL, asked, decode))
    for said in (quantised.info.worker_id, decode.info.worker_id, "kv_format 'int8' and 'plain'", "codec none"):
        assert said in error
    assert decode.hub.arena.used_pages == 0
