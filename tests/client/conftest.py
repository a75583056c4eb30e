"""A real gRPC server that speaks the public service and does what a test scripts it to do."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest

from prismserve.protocol import prismserve_pb2 as pb
from prismserve.protocol import prismserve_pb2_grpc as pb_grpc

WORKER = {
    "id": "decode-1",
    "role": "decode",
    "pid": 4321,
    "node": "node-a",
    "state": "ready",
    "epoch": 7,
    "stats": {"running": 2, "kv_blocks_total": 100, "kv_blocks_used": 25, "a_counter_of_the_future": 1},
}

TURBO = {
    "in_force": "balanced",
    "held": True,
    "control": "auto",
    "since_s": 61.0,
    "reason": "12 of 20 answers differ, the bound is 0.25",
    "disagreement_max": 0.25,
    "disagreed": 0,
    "compared": 3,
    "kl_nats": 0.012,
}


@dataclass
class Failure:
    """Abort the next call with this status after this many messages."""

    code: grpc.StatusCode
    details: str = "scripted"
    metadata: tuple[tuple[str, str], ...] = ()
    after_messages: int = 0


@dataclass
class Service(pb_grpc.InferenceServicer):
    """Answers ``one two three`` with one message per word, after the scripted failures are used up."""

    failures: list[Failure] = field(default_factory=list)
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    deadlines_s: list[float] = field(default_factory=list)
    pause_s: float = 0.0
    finish: bool = True
    status: str = json.dumps({"workers": [WORKER]})
    fidelity: str = json.dumps({"presets": {"turbo": TURBO}})
    presets: list[tuple[str, str]] = field(default_factory=list)
    calls: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)

    async def _fail(self, context, messages: int) -> None:
        if self.failures and self.failures[0].after_messages == messages:
            failure = self.failures.pop(0)
            await context.abort(failure.code, failure.details, failure.metadata)

    @staticmethod
    def _logprobs(request, token: int, word: str) -> list[pb.TokenLogprobs]:
        if not request.sampling.HasField("logprobs"):
            return []
        entry = pb.TokenLogprob(token_id=token, token=word.encode(), logprob=-0.5)
        return [pb.TokenLogprobs(chosen=entry, top=[entry] * request.sampling.logprobs)]

    async def Generate(self, request, context):  # noqa: N802
        self.calls += 1
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.deadlines_s.append(context.time_remaining())
        try:
            for index, word in enumerate(("one", " two", " three")):
                await self._fail(context, index)
                for choice in range(request.sampling.n or 1):
                    logprobs = self._logprobs(request, index + 1, word)
                    yield pb.GenerateResponse(
                        request_id="r-1", text=word, token_ids=[index + 1], index=choice, logprobs=logprobs
                    )
                await asyncio.sleep(self.pause_s)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.finish:
            usage = pb.Usage(prompt_tokens=9, completion_tokens=3, transport="shm", ttft_ms=1.5, decode_worker="d")
            for choice in range(1, request.sampling.n):
                yield pb.GenerateResponse(request_id="r-1", finish_reason="length", index=choice)
            yield pb.GenerateResponse(request_id="r-1", finish_reason="stop", usage=usage)

    async def ListModels(self, request, context):  # noqa: N802
        self.calls += 1
        await self._fail(context, 0)
        return pb.ListModelsResponse(models=[pb.ModelCard(id="reference", max_model_len=512)])

    async def GetStatus(self, request, context):  # noqa: N802
        return pb.GetStatusResponse(json=self.status)

    async def SetPreset(self, request, context):  # noqa: N802
        await self._fail(context, 0)
        self.presets.append((request.preset, request.control))
        return pb.SetPresetResponse(json=self.fidelity)


@dataclass
class Running:
    """The service and where it listens."""

    service: Service
    target: str
    stop: Callable[[], None]


@pytest.fixture
def server() -> Iterator[Running]:
    """Serve from a thread with its own event loop, so that sync and async clients meet the same server."""
    service = Service()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, int]:
        instance = grpc.aio.server(options=(("grpc.max_receive_message_length", 64 << 20),))
        pb_grpc.add_InferenceServicer_to_server(service, instance)
        port = instance.add_insecure_port("127.0.0.1:0")
        await instance.start()
        return instance, port

    instance, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    stopped = threading.Event()

    def stop() -> None:
        if not stopped.is_set():
            stopped.set()
            asyncio.run_coroutine_threadsafe(instance.stop(None), loop).result(10)

    yield Running(service, f"127.0.0.1:{port}", stop)
    stop()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
