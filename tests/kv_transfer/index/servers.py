"""Real servers for tests: Redis or Valkey on loopback, alone, as a Redis Cluster, or watched by a Sentinel."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prismserve.kv_transfer.index.embedded import find_program

PASSWORD = "p/a:s@s#w%rd"
QUOTED = "p%2Fa%3As%40s%23w%25rd"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    """Poll; a server that is not there yet counts as no."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        assert time.monotonic() < deadline, "the servers never reached the state that was waited for"
        time.sleep(0.02)


class Server:
    """A server on a fixed loopback port that a test may stop, freeze, kill and start again, always empty."""

    def __init__(self, program: Path, directory: Path, settings: str = "") -> None:
        self.program = program
        self.directory = directory
        self.password = PASSWORD
        self.settings = settings
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{QUOTED}@127.0.0.1:{self.port}"

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
        """Send one command after AUTH and return the raw replies, as far as one read goes."""

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


def programs() -> list[object]:
    """Parameters for tests: the packaged Valkey, and Redis where it is installed."""
    absent = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not on PATH")
    return [pytest.param("valkey", id="valkey"), pytest.param("redis", id="redis", marks=absent)]


def program(kind: str) -> Path:
    return find_program() if kind == "valkey" else Path(shutil.which("redis-server"))


@contextlib.contextmanager
def cluster_of(binary: Path, directory: Path, masters: int = 3) -> Iterator[list[Server]]:
    """A Redis Cluster: masters that share the 16,384 slots evenly and know one another."""
    nodes = []
    for number in range(masters):
        home = directory / f"node-{number}"
        home.mkdir()
        settings = f"cluster-enabled yes\ncluster-config-file nodes.conf\ncluster-port {free_port()}\n"
        nodes.append(Server(binary, home, settings + "cluster-node-timeout 2000"))
    try:
        for node in nodes:
            node.start()
        bounds = [number * 16384 // masters for number in range(masters + 1)]
        for node, first, beyond in zip(nodes, bounds, bounds[1:], strict=False):
            node.command("CLUSTER", "ADDSLOTSRANGE", str(first), str(beyond - 1), expect=b"+OK")
        bus = nodes[0].settings.partition("cluster-port ")[2].partition("\n")[0]
        for node in nodes[1:]:
            node.command("CLUSTER", "MEET", "127.0.0.1", str(nodes[0].port), bus, expect=b"+OK")
        size = f"cluster_known_nodes:{masters}".encode()
        wait_until(
            lambda: all(
                b"cluster_state:ok" in reply and size in reply
                for reply in (node.command("CLUSTER", "INFO") for node in nodes)
            )
        )
        yield nodes
    finally:
        for node in nodes:
            node.kill()


@contextlib.contextmanager
def sentinel_for(master: Server, directory: Path, settings: str = "") -> Iterator[Server]:
    """A Sentinel of the service ``main``; it takes half a second of silence for death."""
    home = directory / "sentinel"
    home.mkdir()
    watcher = Server(master.program, home)
    config = home / "sentinel.conf"
    config.write_text(
        f"port {watcher.port}\nbind 127.0.0.1\ndir {home}\nrequirepass {watcher.password}\n"
        f'sentinel monitor main 127.0.0.1 {master.port} 1\nsentinel auth-pass main "{master.password}"\n'
        f"sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 3000\n{settings}\n"
    )
    watcher.process = subprocess.Popen([master.program, config, "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: b"PONG" in watcher.command("PING", quiet=True))
        yield watcher
    finally:
        watcher.kill()
