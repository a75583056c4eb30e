"""A small cluster without Ray: an index server, workers in processes of their own or in this one, a router in this one.

Every part is the real one: workers are reached over gRPC on loopback, KV moves over their transports.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import multiprocessing
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from prismserve.core.types import KVLayout, Role
from prismserve.decode_workers.role import attach as attach_decode
from prismserve.engine.config import EngineConfig
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.index.connect import open_index
from prismserve.kv_transfer.index.embedded import EmbeddedServer
from prismserve.models.loader import encoder_fingerprint, inspect_checkpoint, model_fingerprint
from prismserve.models.processing import ChatMessage, ImageSlot, Processor
from prismserve.models.source import resolve_model
from prismserve.prefill_workers.role import attach as attach_prefill
from prismserve.router.calls import Call
from prismserve.router.config import RouterConfig
from prismserve.router.fidelity.config import FidelityConfig
from prismserve.router.generation import Finished, TextDelta
from prismserve.router.media import ImageSource
from prismserve.router.requests import ModelFacts
from prismserve.router.service import RouterService
from prismserve.worker_runtime.config import WorkerConfig
from prismserve.worker_runtime.host import WorkerHost
from prismserve.worker_runtime.runtime import WorkerRuntime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from PIL import Image

    from prismserve.router.calls import CompressionField
    from prismserve.router.usage import Usage

START_TIMEOUT_S: Final = 300.0
CLUSTER_ID: Final = "benchmark"
DTYPE: Final = "float32"
_LOOK_S: Final = 15.0
_READY: Final = "ready"


@dataclass(frozen=True, slots=True)
class Turn:
    """One call: the text of its messages in order, user and assistant in turns, and the pictures of the first one.

    Under another ``salt`` nothing that was cached is found. ``compression`` is as callers give it.
    """

    texts: tuple[str, ...]
    pictures: tuple[bytes, ...] = ()
    max_tokens: int = 1
    salt: str = ""
    compression: CompressionField = None

    def call(self) -> Call:
        """What a front door would make of it; greedy."""
        slots = tuple(ImageSlot(index) for index in range(len(self.pictures)))
        messages = tuple(
            ChatMessage("assistant" if number % 2 else "user", (text,) if number else (*slots, text))
            for number, text in enumerate(self.texts)
        )
        return Call(
            options={"temperature": 0, "max_tokens": self.max_tokens},
            messages=messages,
            media=tuple(ImageSource(picture, "image") for picture in self.pictures),
            compression=self.compression,
            cache_salt=self.salt,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, its report, and when it was asked for, begun and ended by the monotonic clock."""

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    started_s: float
    first_s: float
    ended_s: float


@dataclass
class SmallCluster:
    """Use as an asynchronous context manager.

    Attributes:
        model: a checkpoint directory or name.
        start_timeout_s: how long each worker, and the router's connections, may take to be ready.
        say: called with what a start is at, one line at a time, from any thread.
        runtimes: workers in this process.
        router: how it is asked; there after :meth:`open_router`.
        facts: of the model; there after :meth:`open_router`.
    """

    model: str = "reference"
    start_timeout_s: float = START_TIMEOUT_S
    say: Callable[[str], None] = lambda _: None
    runtimes: list[WorkerRuntime] = field(default_factory=list)
    router: RouterService | None = None
    facts: ModelFacts | None = None

    async def __aenter__(self) -> Self:
        self._server = EmbeddedServer()
        self._secret = secrets.token_hex(16)
        self._server.__enter__()
        self._processes: list[_WorkerProcess] = []
        self._index: Any = None
        return self

    async def __aexit__(self, *_exception: object) -> None:
        if self.router is not None:
            await self.router.stop()
            await self._index.close()
        for runtime in reversed(self.runtimes):
            await runtime.stop()
        for process in self._processes:
            await asyncio.to_thread(process.stop)
        await asyncio.to_thread(self._server.__exit__, None, None, None)

    def config(self, role: Role, **changes: Any) -> WorkerConfig:
        """The configuration of one worker."""
        return WorkerConfig(
            role=role,
            model_directory=self.model,
            dtype=DTYPE,
            cluster_id=CLUSTER_ID,
            cluster_secret=self._secret,
            index_url=self._server.url,
            engine=changes.pop("engine", EngineConfig(kv_cache_bytes=128 << 20)),
            transfer=changes.pop("transfer", TransferConfig(arena_bytes=64 << 20)),
            drain_timeout_s=1.0,
            **changes,
        )

    async def add_here(self, role: Role, **changes: Any) -> WorkerRuntime:
        """Start a worker in this process."""
        runtime = WorkerRuntime(self.config(role, **changes), lambda *_: None)
        await runtime.load()
        _attach(runtime)
        await runtime.serve()
        self.runtimes.append(runtime)
        return runtime

    async def add_process(self, role: Role, **changes: Any) -> None:
        """Start a worker in a process of its own."""
        process = _WorkerProcess(self.config(role, **changes), self.start_timeout_s, self.say)
        self._processes.append(process)
        await asyncio.to_thread(process.wait_ready)

    async def open_router(self, workers: int, **changes: Any) -> RouterService:
        """Start the router and wait until it is connected to so many workers."""
        directory = resolve_model(self.model)
        info = inspect_checkpoint(directory)
        fingerprint = model_fingerprint(directory, DTYPE)
        layout = KVLayout(
            DTYPE, info.layers, info.kv_heads, info.head_dim, EngineConfig().block_tokens, info.position_scheme
        )
        self.facts = ModelFacts(
            "benchmark",
            fingerprint,
            encoder_fingerprint(fingerprint),
            layout,
            info.max_model_len,
            info.hidden_size * layout.dtype_bytes,
        )
        self._index = await open_index(self._server.url, CLUSTER_ID)
        processor = Processor.from_directory(directory)
        config = RouterConfig(**changes)
        # Replays would be measured with the requests.
        fidelity = FidelityConfig(share=0)
        self.router = RouterService(
            processor, self.facts, self._index, config, cluster_secret=self._secret, fidelity=fidelity
        )
        await self.router.start()
        deadline = time.monotonic() + self.start_timeout_s
        while sum(session.connected for session in self.router.pool.sessions) < workers:
            if time.monotonic() > deadline:
                message = f"the router was not connected to {workers} workers in time"
                raise RuntimeError(message)
            await self.router.pool.wait_change(0.25)
        return self.router

    async def ask(self, turn: Turn) -> Answer:
        """One greedy answer and its report."""
        if self.router is None:
            message = "open_router was not called"
            raise RuntimeError(message)
        text, usage = "", None
        tokens: list[int] = []
        started_s, first_s = time.monotonic(), 0.0
        async with contextlib.aclosing(self.router.answer(turn.call(), arrived_at=started_s)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    first_s = first_s or time.monotonic()
                    text += event.text
                    tokens += event.token_ids
                elif isinstance(event, Finished):
                    usage = event.usage
        if usage is None:
            message = "an answer ended without a report"
            raise RuntimeError(message)
        return Answer(text, tuple(tokens), usage, started_s, first_s, time.monotonic())


def png(image: Image.Image) -> bytes:
    """The picture as a file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies, by nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _attach(runtime: WorkerRuntime) -> None:
    role = runtime.config.role
    if role in (Role.PREFILL, Role.MIXED):
        attach_prefill(runtime)
    if role in (Role.DECODE, Role.MIXED):
        attach_decode(runtime)


class _WorkerProcess:
    """A worker in a process of its own; it ends with :meth:`stop` or with this process."""

    def __init__(self, config: WorkerConfig, timeout_s: float, say: Callable[[str], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self._role, self._timeout_s, self._say = config.role.value, timeout_s, say
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(config, theirs, timeout_s), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def wait_ready(self) -> None:
        began = time.monotonic()
        stage = "starting"
        while stage != _READY:
            waited_s = time.monotonic() - began
            if waited_s >= self._timeout_s:
                message = f"the {self._role} worker was not ready in {self._timeout_s:.0f} s; it was {stage}"
                raise RuntimeError(message)
            if not self._pipe.poll(min(_LOOK_S, self._timeout_s - waited_s)):
                self._say(f"the {self._role} worker is still {stage} after {time.monotonic() - began:.0f} s")
                continue
            try:
                stage = self._pipe.recv()
            except EOFError:
                message = f"the {self._role} worker ended while it was {stage}"
                raise RuntimeError(message) from None
        self._say(f"the {self._role} worker is ready after {time.monotonic() - began:.0f} s")

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join(30.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(5.0)


def _serve(config: WorkerConfig, orders: Connection, timeout_s: float) -> None:
    stages: list[str] = []
    lock = threading.Lock()

    def progress(stage: str, _done: int, _total: int) -> None:
        with lock:
            if stage not in stages:
                stages.append(stage)
                orders.send(f"at {stage}")

    host = WorkerHost(config, _attach, progress, timeout_s)
    orders.send(_READY)
    with contextlib.suppress(EOFError):
        orders.recv()
    host.stop()
