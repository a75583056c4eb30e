"""Pairs of workers without a router: layouts that differ, and extensions added as the single files their pages show."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from prismserve.compression import codec as codecs
from prismserve.compression import loader
from prismserve.compression.presets import resolve
from prismserve.core.hashing import digest
from prismserve.core.types import FinishReason, Prompt, Request, Role, SamplingParams, TextSegment, wire_namespace
from prismserve.engine.config import EngineConfig
from prismserve.kv_transfer import transports
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.transports import base
from prismserve.protocol import worker_pb2 as pb
from prismserve.worker_runtime.jobs import Submission

pytestmark = pytest.mark.asyncio(loop_scope="module")
DOCS = Path(__file__).resolve().parents[2] / "docs"
ADDED = ((transports, "stream", "add_a_transport.md"), (codecs, "half", "add_a_codec.md"))
PROMPT_TOKENS, NEW_TOKENS = 75, 12
WIRES = {
    "none": {"codec": "none"},
    "int8": {"codec": "int8", "text": "same", "residual": 0},
    "half": {"codec": "half"},
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """A prefill worker, one with a quantised pool, and a decode worker with larger blocks; KV moves over ``stream``."""
    with pytest.MonkeyPatch.context() as patch:
        for package, name, page in ADDED:
            (code,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
            folder = tmp_path_factory.mktemp(name)
            (folder / f"{name}.py").write_text(code)
            patch.setattr(package, "__path__", [*package.__path__, str(folder)])
        base.names.cache_clear()
        loader.forget()
        transfer = TransferConfig(arena_bytes=32 << 20, transports=("stream",))
        made = open_world()
        pool = 48 << 20
        await made.add(Role.PREFILL, transfer=transfer)
        await made.add(Role.PREFILL, transfer=transfer, engine=EngineConfig(kv_cache_bytes=pool, kv_cache_dtype="int8"))
        await made.add(Role.DECODE, transfer=transfer, engine=EngineConfig(kv_cache_bytes=pool, block_tokens=64))
        yield made
    for package, name, _ in ADDED:
        sys.modules.pop(f"{package.__name__}.{name}", None)
    base.names.cache_clear()
    loader.forget()


def request(name: str, codec: str) -> Request:
    plan = resolve({"wire": WIRES[codec]}, "off")
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    prompt = Prompt((TextSegment(tuple(range(10, 10 + PROMPT_TOKENS))),))
    # A namespace for each request: no cache stands in for what is to be computed or moved.
    root = digest("test", name.encode())
    wire_root = wire_namespace(root, plan.wire, lossy=loader.codec(plan.wire.name).lossy)
    return Request(name, 0, root, wire_root, prompt, (), sampling, plan)


async def ask(worker: Any, job: int, asked: Request, target: Any = None) -> asyncio.Queue[Any]:
    """Submit as a router does; the session's outbox."""
    session = worker.sessions.open(f"router of {asked.request_id}")
    worker.sessions.adopt(session, (asked.request_id, asked.attempt))
    place = ("", 0) if target is None else (target.info.worker_id, target.info.epoch)
    await worker.handler(job).submit(Submission(asked, job, *place, "", 0, ()))
    return session.outbox


async def answer(outbox: asyncio.Queue[Any]) -> tuple[list[int], Any]:
    """Tokens, and the output with which they ended."""
    tokens: list[int] = []
    while True:
        message = await asyncio.wait_for(outbox.get(), 20)
        for output in message.outputs.outputs:
            tokens += output.token_ids
            if output.finish_reason:
                return tokens, output


@pytest.mark.parametrize("codec", ["none", "int8", "half"])
async def test_an_added_transport_and_codec_and_another_block_size_leave_the_answer_as_it_is(
    world: Any, codec: str
) -> None:
    prefill, _, decode = world.workers
    layout = prefill.engine.layout
    assert layout.block_tokens != decode.engine.layout.block_tokens
    asked = request(f"handed over under {codec}", codec)
    outbox = await ask(decode, pb.JOB_DECODE, asked)
    sent_before = prefill.exchange.counters.sent_bytes
    await ask(prefill, pb.JOB_PREFILL, asked, decode)
    tokens, last = await answer(outbox)
    assert last.finish_reason == FinishReason.LENGTH, last.error
    alone, _ = await answer(await ask(decode, pb.JOB_LOCAL, request(f"alone beside {codec}", "none")))
    assert tokens == alone
    assert len(tokens) == NEW_TOKENS
    sent = prefill.exchange.counters.sent_bytes - sent_before
    share = {"none": 1.0, "half": 0.5}.get(codec)
    assert share is None or sent == PROMPT_TOKENS * layout.token_bytes * share
    assert set(prefill.hub.bandwidth(decode.info.worker_id)) == {"stream"}
    decode.engine_loop.call(lambda engine: engine.check_integrity()).result(5)
    assert decode.hub.arena.used_pages == 0


async def test_another_format_is_refused_under_an_exact_codec_and_the_error_names_both_sides(world: Any) -> None:
    _, quantised, decode = world.workers
    asked = request("refused", "none")
    await ask(decode, pb.JOB_DECODE, asked)
    _, last = await answer(await ask(quantised, pb.JOB_PREFILL, asked, decode))
    for said in (quantised.info.worker_id, decode.info.worker_id, "kv_format 'int8' and 'plain'", "codec none"):
        assert said in last.error
    assert decode.hub.arena.used_pages == 0
