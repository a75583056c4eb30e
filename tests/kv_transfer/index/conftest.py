"""Indexes under test, and the servers behind them: the packaged Valkey, and Redis where it is installed."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace

import pytest

from prismserve.core.types import KVLayout, Role, WorkerInfo
from prismserve.kv_transfer.index.base import KVIndex
from prismserve.kv_transfer.index.config import IndexConfig
from prismserve.kv_transfer.index.memory import MemoryIndex, MemoryStore
from prismserve.kv_transfer.index.mirror import Mirror
from prismserve.kv_transfer.index.redis import RedisIndex
from prismserve.kv_transfer.index.url import parse_url
from tests.kv_transfer.index.servers import Server, program, programs

FAST = IndexConfig(lease_ttl_s=2.0, heartbeat_interval_s=0.1, call_timeout_s=1.0, poll_interval_s=0.1)
_CLUSTERS = itertools.count()


@pytest.fixture(scope="session")
def shared_servers(tmp_path_factory) -> Iterator[Callable[[str], Server]]:
    """One running server per kind, for all tests that do it no harm."""
    running: dict[str, Server] = {}

    def get(kind: str) -> Server:
        if kind not in running:
            running[kind] = Server(program(kind), tmp_path_factory.mktemp(kind))
            running[kind].start()
        return running[kind]

    yield get
    for server in running.values():
        server.kill()


@pytest.fixture(params=programs())
def shared_server(request, shared_servers) -> Server:
    """A server that the test leaves as it found it."""
    return shared_servers(request.param)


@pytest.fixture(params=programs())
def server(request, tmp_path) -> Iterator[Server]:
    """A server of the test's own, to do harm to."""
    server = Server(program(request.param), tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def cluster() -> str:
    """A cluster name no other test uses."""
    return f"test-{os.getpid()}-{next(_CLUSTERS)}"


@pytest.fixture
def config() -> IndexConfig:
    """Short leases and deadlines."""
    return FAST


@pytest.fixture
async def opened() -> AsyncIterator[list[KVIndex]]:
    """Indexes to close at the end of the test."""
    indexes: list[KVIndex] = []
    yield indexes
    for index in indexes:
        await index.close()


@pytest.fixture
def redis_index(cluster, config, opened) -> Callable[..., RedisIndex]:
    """Open an index on a server."""

    def build(server: Server, config: IndexConfig = config, cluster: str = cluster) -> RedisIndex:
        index = RedisIndex(parse_url(server.url), cluster, config)
        opened.append(index)
        return index

    return build


@pytest.fixture(params=["memory", *programs()])
def new_index(request, shared_servers, cluster, config, opened) -> Callable[[], KVIndex]:
    """Open one more client of the same index, as another process would."""
    if request.param == "memory":
        store = MemoryStore()

        def build_memory() -> KVIndex:
            index = MemoryIndex(store, config)
            opened.append(index)
            return index

        return build_memory
    server = shared_servers(request.param)

    def build_redis() -> KVIndex:
        index = RedisIndex(parse_url(server.url), cluster, config)
        opened.append(index)
        return index

    return build_redis


@pytest.fixture
def index(new_index) -> KVIndex:
    """The index under test."""
    return new_index()


@pytest.fixture
def info() -> Callable[..., WorkerInfo]:
    """Make worker records."""
    base = WorkerInfo(
        worker_id="w1",
        role=Role.PREFILL,
        epoch=0,
        pid=7,
        node="node-a",
        control_address="127.0.0.1:5000",
        model_fingerprint=b"m" * 32,
        layout=KVLayout("float32", 2, 2, 8, 16),
        transports=("nixl", "shm"),
        endpoint=b"\x00\xff" * 16,
    )
    return lambda worker_id="w1", **changes: replace(base, worker_id=worker_id, **changes)


@pytest.fixture
def eventually() -> Callable[..., Awaitable[None]]:
    """Wait until a condition holds, at most some seconds."""

    async def wait(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)

    return wait


@pytest.fixture
async def follow() -> AsyncIterator[Callable[[KVIndex], Mirror]]:
    """Start mirrors that follow an index until the test ends."""
    stop = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    def start(index: KVIndex) -> Mirror:
        mirror = Mirror()
        tasks.append(asyncio.create_task(index.follow(mirror, stop)))
        return mirror

    yield start
    stop.set()
    for task in tasks:
        await asyncio.wait_for(task, 10)
