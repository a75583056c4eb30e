"""A small world in one process: a real index server, real workers with real transports, a real router."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest_asyncio

from prismserve.core.types import KVLayout, Role
from prismserve.decode_workers.role import attach as attach_decode
from prismserve.engine.config import EngineConfig
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.index.connect import open_index
from prismserve.kv_transfer.index.embedded import EmbeddedServer
from prismserve.models.loader import encoder_fingerprint, inspect_checkpoint, model_fingerprint
from prismserve.models.processing import ChatMessage, ImageSlot, Processor
from prismserve.models.reference import reference_path
from prismserve.models.reference.scenes import make_scene
from prismserve.prefill_workers.role import attach as attach_prefill
from prismserve.router.calls import Call
from prismserve.router.config import RouterConfig
from prismserve.router.fidelity.config import FidelityConfig
from prismserve.router.generation import Finished, TextDelta
from prismserve.router.media import ImageSource
from prismserve.router.requests import ModelFacts
from prismserve.router.service import RouterService
from prismserve.worker_runtime.config import WorkerConfig
from prismserve.worker_runtime.runtime import WorkerRuntime

SECRET = "a secret of the test's own cluster"
ATTACH: dict[Role, tuple[Callable[[WorkerRuntime], None], ...]] = {
    Role.PREFILL: (attach_prefill,),
    Role.DECODE: (attach_decode,),
    Role.MIXED: (attach_prefill, attach_decode),
}


@dataclass
class Answer:
    """What came back for one question."""

    text: str
    token_ids: list[int]
    usage: Any
    logprobs: list[Any] = field(default_factory=list)
    others: dict[int, list[int]] = field(default_factory=dict)


@dataclass
class World:
    """Workers and a router that can be asked."""

    url: str
    cluster: str
    workers: list[WorkerRuntime] = field(default_factory=list)
    router: RouterService | None = None
    index: Any = None

    async def add(self, role: Role, **changes: Any) -> WorkerRuntime:
        """Start one more worker."""
        config = WorkerConfig(
            role=role,
            model_directory="reference",
            dtype="float32",
            cluster_id=self.cluster,
            cluster_secret=SECRET,
            index_url=self.url,
            engine=changes.pop("engine", EngineConfig(kv_cache_bytes=48 << 20)),
            transfer=changes.pop("transfer", TransferConfig(arena_bytes=32 << 20, link_choice="order")),
            drain_timeout_s=1.0,
            **changes,
        )
        runtime = WorkerRuntime(config, lambda *_: None)
        await runtime.load()
        for attach in ATTACH[role]:
            attach(runtime)
        await runtime.serve()
        self.workers.append(runtime)
        return runtime

    async def open_router(self, **changes: Any) -> RouterService:
        """Start the router and wait until it can serve."""
        path = reference_path()
        info = inspect_checkpoint(path)
        fingerprint = model_fingerprint(path, "float32")
        kv_format, fidelity = changes.pop("kv_format", "plain"), changes.pop("fidelity", FidelityConfig(share=0))
        layout = KVLayout("float32", info.layers, info.kv_heads, info.head_dim, 16, kv_format=kv_format)
        facts = ModelFacts("reference", fingerprint, encoder_fingerprint(fingerprint), layout, info.max_model_len)
        self.index = await open_index(self.url, self.cluster)
        self.router = RouterService(
            Processor.from_directory(path),
            facts,
            self.index,
            RouterConfig(**changes),
            cluster_secret=SECRET,
            fidelity=fidelity,
        )
        await self.router.start()
        assert await self.router.wait_ready(20)
        return self.router

    async def wait_connected(self, workers: int) -> None:
        """Wait until the router has a stream to so many workers."""
        assert self.router is not None
        for _ in range(100):
            if sum(session.connected for session in self.router.pool.sessions) == workers:
                return
            await self.router.pool.wait_change(0.1)
        message = f"the router never had {workers} workers"
        raise AssertionError(message)

    async def ask(self, scene: int, question: str, compression: Any = None, **options: Any) -> Answer:
        """One question about one generated scene, greedy unless ``options`` say otherwise."""
        assert self.router is not None
        stream = io.BytesIO()
        make_scene(scene)[0].save(stream, "PNG")
        call = Call(
            options={"temperature": 0, "max_tokens": 32, **options},
            messages=(ChatMessage("user", (ImageSlot(0), question)),),
            media=(ImageSource(stream.getvalue(), "image"),),
            compression=compression,
        )
        answer = Answer("", [], None)
        async with contextlib.aclosing(self.router.answer(call, arrived_at=time.monotonic())) as events:
            async for event in events:
                if isinstance(event, TextDelta) and event.index:
                    answer.others.setdefault(event.index, []).extend(event.token_ids)
                elif isinstance(event, TextDelta):
                    answer.logprobs += event.logprobs
                    answer.text += event.text
                    answer.token_ids += event.token_ids
                elif isinstance(event, Finished):
                    answer.usage = event.usage or answer.usage
        return answer

    async def close(self) -> None:
        """Stop everything, last started first."""
        if self.router is not None:
            await self.router.stop()
            await self.index.close()
        for runtime in reversed(self.workers):
            await runtime.stop()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def open_world() -> AsyncIterator[Callable[[], World]]:
    """Makes worlds over one index server; each has a cluster id of its own."""
    worlds: list[World] = []
    with EmbeddedServer() as server:

        def make() -> World:
            worlds.append(World(server.url, f"test-{len(worlds)}"))
            return worlds[-1]

        yield make
        for world in worlds:
            await world.close()
