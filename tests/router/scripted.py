"""A worker that speaks the real protocol and says what its script says."""

from __future__ import annotations

import asyncio
import contextlib
import io
from dataclasses import dataclass, field

import grpc
import numpy as np
from PIL import Image

from prismserve.core.types import (
    FinishReason,
    KVLayout,
    PrefillReport,
    TokenLogprobs,
    TokenOutput,
    WorkerInfo,
    WorkerStats,
)
from prismserve.protocol import worker_pb2 as pb
from prismserve.protocol import worker_pb2_grpc as rpc
from prismserve.protocol.channel import SERVER_OPTIONS
from prismserve.protocol.convert import stats_to_proto, token_output_to_proto

LAYOUT = KVLayout("float32", 6, 2, 64, 16)
MODEL = b"m" * 32


def png(width=32, height=24, seed=0, mode="RGB"):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "PNG")
    return out.getvalue()


@dataclass
class Fabric:
    """What the prefill side tells the decode side, in place of KV."""

    arrived: dict = field(default_factory=dict)

    def event(self, key):
        return self.arrived.setdefault(key, asyncio.Event())


@dataclass
class Script:
    """How a worker behaves.

    token_ids: the whole answer; a resumed request gets the rest of it.
    die_at: end the stream abruptly after this many tokens of the whole answer.
    fail: error text sent instead of tokens.
    fail_job: the one job that fails with it; every job if None.
    pause_s: before each token.
    explanation: what is said when one is asked for.
    Log-probabilities, if asked for, are -0.5 for the token and -0.5, -1.5, ... for it and the tokens after it.
    """

    token_ids: tuple = ()
    die_at: int | None = None
    fail: str | None = None
    fail_job: int | None = None
    pause_s: float = 0.0
    answers: tuple = ()  # of one request after another, in place of token_ids
    finish: FinishReason = FinishReason.STOP
    silent: bool = False
    explanation: pb.ExplainReply = field(default_factory=pb.ExplainReply)


def _logprobs(token, sampling):
    if not sampling.HasField("logprobs"):
        return ()
    top = tuple((token + number, -0.5 - number) for number in range(sampling.logprobs))
    return (TokenLogprobs(-0.5, top),)


class ScriptedWorker(rpc.WorkerServicer):
    def __init__(self, worker_id, role, script, fabric, index):
        self.worker_id, self.role, self.script = worker_id, role, script
        self.fabric, self.index = fabric, index
        self.submits, self.cancels, self.explained = [], [], []
        self.sessions = 0
        self.epoch = 0
        self.server = None
        self._running = {}
        self._numbers = {}

    async def start(self):
        self.server = grpc.aio.server(options=list(SERVER_OPTIONS))
        rpc.add_WorkerServicer_to_server(self, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        await self.register(port)
        return self

    async def register(self, port):
        info = WorkerInfo(
            self.worker_id, self.role, 0, 1234, "node-a", f"127.0.0.1:{port}", MODEL, LAYOUT, ("nixl", "shm"), b""
        )
        self.epoch = await self.index.register(info)

    async def stop(self):
        await self.server.stop(0)

    async def die(self):
        """Leave without a word, as a killed process does."""
        await self.server.stop(0)
        await self.index.drop_worker(self.worker_id)

    async def Session(self, requests, context):  # noqa: N802 - the name in the schema
        self.sessions += 1
        hello = await anext(aiter(requests))
        assert hello.WhichOneof("body") == "hello"
        out = asyncio.Queue()
        await out.put(pb.WorkerMessage(welcome=pb.Welcome(worker_id=self.worker_id, epoch=self.epoch)))
        stats = WorkerStats(kv_blocks_total=100, kv_blocks_used=10, prefix_query_tokens=10, prefix_hit_tokens=5)
        await out.put(pb.WorkerMessage(stats=stats_to_proto(stats, "ready")))
        reader = asyncio.create_task(self._read(requests, out))
        try:
            while (message := await out.get()) is not None:
                yield message
        finally:
            for task in [reader, *self._running.values()]:
                task.cancel()
            await asyncio.gather(reader, *self._running.values(), return_exceptions=True)

    async def Explain(self, request, context):  # noqa: N802 - the name in the schema
        self.explained.append(request.request)
        if self.script.fail is not None:
            return pb.ExplainReply(refusal=self.script.fail)
        if self.script.silent:
            await asyncio.sleep(60)
        return self.script.explanation

    async def _read(self, requests, out):
        async for message in requests:
            if message.WhichOneof("body") == "cancel":
                key = (message.cancel.request_id, message.cancel.attempt)
                self.cancels.append(key)
                with contextlib.suppress(KeyError):
                    self._running.pop(key).cancel()
            else:
                submit = message.submit
                self.submits.append(submit)
                key = (submit.request.request_id, submit.request.attempt)
                self._running[key] = asyncio.create_task(self._serve(submit, key, out))

    async def _serve(self, submit, key, out):
        script = self.script
        if script.fail is not None and script.fail_job in (None, submit.job):
            await self._emit(out, TokenOutput(*key, (), FinishReason.ERROR, script.fail))
            return
        if script.silent:
            return
        if submit.job == pb.JOB_PREFILL:
            self.fabric.event(key).set()
            return
        if submit.job == pb.JOB_DECODE:
            await self.fabric.event(key).wait()
        done = len(submit.request.resume_token_ids)
        script_ids = script.token_ids
        if script.answers:
            number = self._numbers.setdefault(key[0], len(self._numbers))
            script_ids = script.answers[number]
        limit = min(len(script_ids), submit.request.sampling.max_tokens)
        report = PrefillReport(
            worker_id=self.worker_id,
            cached_tokens=16,
            kv_bytes_kept=100,
            kv_bytes_raw=400,
            kv_bytes_sent=50,
            prefill_ms=0.5,
            transport="shm",
        )
        for at in range(done, limit):
            if script.die_at == at:
                script.die_at = None
                await out.put(None)
                return
            await asyncio.sleep(script.pause_s)
            finish = None
            if at == limit - 1:
                finish = script.finish if limit == len(script_ids) else FinishReason.LENGTH
            first = report if at == done else None
            logprobs = _logprobs(script_ids[at], submit.request.sampling)
            token = TokenOutput(*key, (script_ids[at],), finish, "", first, logprobs)
            await self._emit(out, token)

    @staticmethod
    async def _emit(out, output):
        await out.put(pb.WorkerMessage(outputs=pb.StepOutputs(outputs=[token_output_to_proto(output)])))
