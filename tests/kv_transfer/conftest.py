"""Workers in this process and in others, and KV that both sides can compute from a seed."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from prismserve.compression import loader
from prismserve.core.types import KVLayout, Manifest, MethodSpec, Payload, Reservation, Role, WorkerInfo
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.hub import TransportHub
from prismserve.kv_transfer.manifest import Expected, build
from prismserve.kv_transfer.plan import reserve_bytes
from prismserve.kv_transfer.receiver import Receiver
from prismserve.kv_transfer.sender import Outgoing

LAYOUT = KVLayout("float32", layers=3, kv_heads=2, head_dim=16, block_tokens=16)
PEER = Path(__file__).with_name("peer.py")


def spec(name: str) -> MethodSpec:
    return loader.normalise(loader.codec(name), {}, "compression.wire")


def kv(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYOUT.layers, tokens, LAYOUT.kv_heads, LAYOUT.head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        time.sleep(0.005)


@dataclass
class Worker:
    """One worker of this process."""

    arena: Arena
    hub: TransportHub
    receiver: Receiver
    got: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def info(self) -> WorkerInfo:
        hub = self.hub
        return WorkerInfo(
            hub.worker_id, Role.MIXED, 1, 1, "node", "localhost:1", bytes(32), LAYOUT, hub.transports, hub.endpoint()
        )

    def sink(self, layer: int, start_token: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert (layer, start_token) not in self.got, "a piece was delivered twice"
        self.got[layer, start_token] = (keys.clone(), values.clone())

    def reserve(self, expected: Expected, ttl_s: float | None = None) -> Reservation:
        nbytes = reserve_bytes(expected.prompt_tokens, expected.codec, LAYOUT)
        return self.receiver.reserve(expected, nbytes, self.sink, ttl_s=ttl_s)

    def close(self) -> None:
        self.receiver.close()
        self.hub.close()
        self.arena.close()


def expect(codec: str = "none", tokens: int = 100, cached_tokens: int = 0, request_id: str = "request") -> Expected:
    return Expected(request_id, 0, "a", 1, bytes(range(32)), spec(codec), tokens, cached_tokens)


def push_all(outgoing: Outgoing, seed: int, tokens: int, chunk: int = 40) -> None:
    keys, values = kv(seed, tokens)
    for start in range(0, tokens, chunk):
        for layer in range(LAYOUT.layers):
            outgoing.push(layer, start, keys[layer, start : start + chunk], values[layer, start : start + chunk])


def manifest_of(expected: Expected, payloads: tuple[Payload, ...]) -> Manifest:
    tokens = expected.prompt_tokens
    return build(
        expected, LAYOUT, payloads, layer_tokens=(tokens,) * LAYOUT.layers, next_position=tokens, first_token_ids=(7,)
    )


def assert_received(
    got: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]], seed: int, tokens: int, atol: float, cached: int = 0
) -> None:
    keys, values = kv(seed, tokens)
    for layer in range(LAYOUT.layers):
        covered = 0
        for (_, start), (k, v) in sorted((key, pair) for key, pair in got.items() if key[0] == layer):
            torch.testing.assert_close(k, keys[layer, start : start + len(k)], rtol=0, atol=atol)
            torch.testing.assert_close(v, values[layer, start : start + len(v)], rtol=0, atol=atol)
            covered += len(k)
        assert covered == tokens - cached


class Peer:
    """A worker in another process, driven over its standard input and output."""

    def __init__(self, worker_id: str, config: TransferConfig) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), worker_id, config.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def call(self, command: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump((command, arguments), self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.process.stdout)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@pytest.fixture
def make_worker() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def make(worker_id: str, config: TransferConfig | None = None) -> Worker:
        config = config or TransferConfig(arena_bytes=8 << 20, transports=("local",), notify_timeout_s=0.5)
        arena = Arena(config)
        hub = TransportHub(worker_id, arena, config)
        worker = Worker(arena, hub, Receiver(hub, LAYOUT))
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture
def make_peer() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def make(worker_id: str, config: TransferConfig) -> Peer:
        peer = Peer(worker_id, config)
        peers.append(peer)
        return peer

    yield make
    for peer in peers:
        peer.close()


# Test modules and the peer process import the helpers above under one name, whatever pytest calls this file.
sys.modules.setdefault("kv_transfer_conftest", sys.modules[__name__])
