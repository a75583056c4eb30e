"""Workers as processes without Ray, driven by a router in the test's own process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import redis

from prismserve.core.types import Role
from prismserve.engine.config import EngineConfig
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.index.config import IndexConfig
from prismserve.models.processing import ChatMessage, ImageSlot
from prismserve.models.reference.scenes import make_scene
from prismserve.router.calls import Call
from prismserve.router.generation import Finished, TextDelta
from prismserve.router.media import ImageSource
from prismserve.worker_runtime.config import WorkerConfig
from tests.worker_runtime.conftest import SECRET, World

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("worker_process.py")
START_S = 150.0
SHORT_LEASE = IndexConfig(lease_ttl_s=1.5, heartbeat_interval_s=0.3, call_timeout_s=0.5)


class WorkerProcess:
    """A worker of its own process; ``state`` asks it what it holds."""

    def __init__(self, config: WorkerConfig, prefix: tuple[str, ...] = ()) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(SCRIPT), config.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.worker_id = ""

    async def ready(self) -> None:
        self.worker_id = (await self._answer(START_S))["worker_id"]

    async def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
        self.process.stdin.flush()
        return await self._answer(30)

    async def state(self) -> dict[str, Any]:
        return await self.call("state")

    async def _answer(self, timeout_s: float) -> dict[str, Any]:
        line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), timeout_s)
        assert line, "the worker has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    async def stop(self) -> None:
        """End it in order; kill it if it does not end."""
        if self.alive:
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.close()
            try:
                await asyncio.to_thread(self.process.wait, 20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        await asyncio.to_thread(self.process.wait, 10)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


class ProcessWorld(World):
    """A world whose workers are processes."""

    async def add(self, role: Role, *, prefix: tuple[str, ...] = (), **changes: Any) -> Any:
        changes.setdefault("engine", EngineConfig(kv_cache_bytes=48 << 20))
        changes.setdefault("transfer", TransferConfig(arena_bytes=32 << 20, link_choice="order"))
        changes.setdefault("index_url", self.url)
        config = WorkerConfig(
            role=role,
            model_directory="reference",
            dtype="float32",
            cluster_id=self.cluster,
            cluster_secret=SECRET,
            drain_timeout_s=1.0,
            **changes,
        )
        worker = WorkerProcess(config, prefix)
        self.workers.append(worker)
        await worker.ready()
        return worker

    async def add_all(self, *roles: Role, **changes: Any) -> list[Any]:
        return list(await asyncio.gather(*(self.add(role, **changes) for role in roles)))

    def worker(self, worker_id: str) -> Any:
        return next(worker for worker in self.workers if worker.worker_id == worker_id)

    def index_keys(self) -> set[str]:
        """Names of this cluster's keys at the index server."""
        with redis.Redis.from_url(self.url) as connection:
            return {name.decode().rpartition("}:")[2] for name in connection.keys(f"prismserve:{{{self.cluster}}}:*")}


def kinds(keys: set[str]) -> set[str]:
    """Key names without worker ids and epochs."""
    return {re.match(r"[a-z]+", key)[0] for key in keys}


def call_of(scene: int, question: str = "Describe the image.", **fields: Any) -> Call:
    stream = io.BytesIO()
    make_scene(scene)[0].save(stream, "PNG")
    options = {"temperature": 0, "max_tokens": 32, **fields.pop("options", {})}
    return Call(
        options=options,
        messages=(ChatMessage("user", (ImageSlot(0), question)),),
        media=(ImageSource(stream.getvalue(), "image"),),
        **fields,
    )


async def stream(world: World, call: Call) -> AsyncIterator[TextDelta | Finished]:
    async with contextlib.aclosing(world.router.answer(call, arrived_at=time.monotonic())) as events:
        async for event in events:
            yield event


async def ask(world: World, call: Call) -> tuple[list[int], Any]:
    """Tokens and usage of one answer."""
    token_ids: list[int] = []
    usage = None
    async for event in stream(world, call):
        if isinstance(event, TextDelta):
            token_ids += event.token_ids
        else:
            usage = event.usage
    return token_ids, usage


async def until(condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "") -> None:
    """Wait for a condition, which may be a coroutine function."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        assert time.monotonic() < deadline_s, what or "the condition did not come true in time"
        await asyncio.sleep(0.02)


IDLE = {
    "running": 0,
    "waiting": 0,
    "requests": 0,
    "blocks_used": 0,
    "pages": 0,
    "staging": 0,
    "leases": 0,
    "landing": 0,
}


def held(state: dict[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name in IDLE}


async def returns_to_baseline(*workers: Any, timeout_s: float = 10.0) -> None:
    """Every block, page, lease and request of living workers is free again; their pools add up."""
    for worker in workers:
        state: dict[str, Any] = {}
        deadline_s = time.monotonic() + timeout_s
        while held(state := await worker.state()) != IDLE:
            assert time.monotonic() < deadline_s, f"{worker.worker_id} still holds {held(state)}"
            await asyncio.sleep(0.05)
        assert state["whole"]
