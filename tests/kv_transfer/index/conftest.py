"""Servers the index is tested against: the packaged Valkey, and Redis where it is installed."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from prismserve.core.types import KVLayout, Role, WorkerInfo
from prismserve.kv_transfer.index.base import KVIndex
from prismserve.kv_transfer.index.config import IndexConfig
from prismserve.kv_transfer.index.embedded import find_program
from prismserve.kv_transfer.index.memory import MemoryIndex, MemoryStore
from prismserve.kv_transfer.index.mirror import Mirror
from prismserve.kv_transfer.index.redis import RedisIndex
from prismserve.kv_transfer.index.url import parse_url

FAST = IndexConfig(lease_ttl_s=1.0, heartbeat_interval_s=0.1, call_timeout_s=0.6, poll_interval_s=0.1)
_CLUSTERS = itertools.count()


class Server:
    """A server on a fixed loopback port that a test may stop, freeze, kill and start again, always empty."""

    def __init__(self, program: Path, directory: Path, settings: str = "") -> None:
        self.program = program
        self.directory = directory
        self.password = "p/a:s@s#w%rd"
        self.settings = settings
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:p%2Fa%3As%40s%23w%25rd@127.0.0.1:{self.port}"

    def start(self) -> None:
        config = (
            f"bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\ndir {self.directory}\n"
            f'save ""\nappendonly no\n{self.settings}\n'
        )
        self.process = subprocess.Popen([self.program, "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.process.stdin.write(config.encode())
        self.process.stdin.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                if b"OK" in self.command("PING", expect=b"PONG", quiet=True):
                    return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.01)

    def command(self, *words: str, expect: bytes = b"", quiet: bool = False) -> bytes:
        """Send one command after AUTH and return the raw replies."""

        def encode(*parts: str) -> bytes:
            return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p.encode()) for p in parts)

        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(encode("AUTH", self.password))
            replies = connection.recv(64)
            connection.sendall(encode(*words))
            replies += connection.recv(65536)
        assert quiet or b"-" not in replies[:1] + replies[5:6], replies
        assert expect in replies, replies
        return replies

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)
            self.process = None


def _programs() -> list[object]:
    redis = shutil.which("redis-server")
    absent = pytest.mark.skipif(redis is None, reason="redis-server is not on PATH")
    return [pytest.param("valkey", id="valkey"), pytest.param("redis", id="redis", marks=absent)]


def _find(kind: str) -> Path:
    return find_program() if kind == "valkey" else Path(shutil.which("redis-server"))


@pytest.fixture(scope="session")
def shared_servers(tmp_path_factory) -> Iterator[Callable[[str], Server]]:
    """One running server per kind, for all tests that do it no harm."""
    running: dict[str, Server] = {}

    def get(kind: str) -> Server:
        if kind not in running:
            running[kind] = Server(_find(kind), tmp_path_factory.mktemp(kind))
            running[kind].start()
        return running[kind]

    yield get
    for server in running.values():
        server.kill()


@pytest.fixture(params=_programs())
def shared_server(request, shared_servers) -> Server:
    """A server that the test leaves as it found it."""
    return shared_servers(request.param)


@pytest.fixture(params=_programs())
def server(request, tmp_path) -> Iterator[Server]:
    """A server of the test's own, to do harm to."""
    server = Server(_find(request.param), tmp_path)
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


@pytest.fixture(params=["memory", *_programs()])
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
