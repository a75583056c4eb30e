"""One write from process to process, timed: our transports, raw NIXL, memcpy, and others who take part."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final, Protocol

import torch

from prismserve.compression.wire import EXACT
from prismserve.core.types import KVLayout, Reservation, Role, WorkerInfo
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.hub import TransportHub
from prismserve.kv_transfer.manifest import Expected
from prismserve.kv_transfer.receiver import Receiver
from prismserve.kv_transfer.transports.base import Link, WriteHandle
from prismserve.kv_transfer.wire import encode_probe

SIZES: Final = (64 << 10, 1 << 20, 16 << 20, 256 << 20)
ROUNDS: Final = 5
_ROUND_BYTES: Final = 128 << 20
_ROUND_WRITES_MAX: Final = 100
_WARM_UP: Final = 2
_LARGEST: Final = max(SIZES)
_ARENA_BYTES: Final = 3 * _LARGEST
LAYOUT: Final = KVLayout("float32", layers=1, kv_heads=8, head_dim=128, block_tokens=16)


def config(transport: str) -> TransferConfig:
    """Room for the largest write on both sides."""
    return TransferConfig(
        arena_bytes=_ARENA_BYTES, staging_share=0.4, transports=(transport,), lease_ttl_s=600.0, write_timeout_s=60.0
    )


@dataclass
class Samples:
    """Seconds of single writes: a list for each round, by (contender, bytes)."""

    rounds: dict[tuple[str, int], list[list[float]]] = field(default_factory=dict)

    def add(self, name: str, nbytes: int, seconds: Sequence[float]) -> None:
        """One contender's writes of one size in one round."""
        self.rounds.setdefault((name, nbytes), []).append(list(seconds))

    def best_s(self, name: str, nbytes: int) -> float:
        """Seconds of a write at the median of the best round, which is what a busy machine disturbs least."""
        return min(statistics.median(seconds) for seconds in self.rounds[name, nbytes])

    def gigabytes_per_s(self, name: str, nbytes: int) -> float:
        """10^9 bytes per second at that time."""
        return nbytes / self.best_s(name, nbytes) / 1e9

    def names(self) -> list[str]:
        """Contenders in order of appearance."""
        return list(dict.fromkeys(name for name, _ in self.rounds))


def writes(nbytes: int) -> int:
    """Writes in one round."""
    return max(2, min(_ROUND_WRITES_MAX, _ROUND_BYTES // nbytes))


def halves() -> tuple[set[int], set[int]]:
    """Processors of those who write and of those who are written to; the same where there is one only.

    Two processes that ask without pause and share a processor would measure how long the scheduler's turns are.
    """
    allowed = sorted(os.sched_getaffinity(0))
    half = len(allowed) // 2
    return (set(allowed[:half]), set(allowed[half:])) if half else (set(allowed), set(allowed))


# ---- the other process --------------------------------------------------------------------------------------------


def serve_ours(connection: Connection, transport: str) -> None:
    """A receiver with one open lease over its whole arena, until the connection closes."""
    torch.set_num_threads(1)
    settings = config(transport)
    arena = Arena(settings)
    hub = TransportHub("target", arena, settings)
    receiver = Receiver(hub, LAYOUT)
    tokens = _LARGEST // LAYOUT.token_layer_bytes
    expected = Expected("bench", 0, "source", 1, bytes(32), EXACT, tokens)
    reservation = receiver.reserve(expected, _LARGEST, lambda *_: None)
    info = WorkerInfo("target", Role.DECODE, 1, os.getpid(), "", "", bytes(32), LAYOUT, hub.transports, hub.endpoint())
    connection.send((info, reservation))
    with contextlib.suppress(EOFError):
        while connection.recv() == "lease":
            receiver.release(reservation.lease_id)
            reservation = receiver.reserve(expected, _LARGEST, lambda *_: None)
            connection.send(reservation)
    receiver.close()
    hub.close()
    arena.close()


def serve_raw(connection: Connection) -> None:
    """A NIXL agent that makes progress without pause while it is told to, which is the best a target can do."""
    torch.set_num_threads(1)
    api = _nixl()
    agent = api.nixl_agent("target", api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    memory = torch.zeros(_LARGEST, dtype=torch.uint8)
    agent.register_memory(memory)
    connection.send((bytes(agent.get_agent_metadata()), memory.data_ptr()))
    with contextlib.suppress(EOFError):
        while connection.recv() == "spin":
            while not connection.poll():
                agent.get_new_notifs()
            connection.recv()
            connection.send("idle")
    os._exit(0)  # NIXL's destructors may abort a process whose peer has gone


def _nixl() -> Any:
    from nixl_cu12 import _api

    _api.logger.setLevel(logging.WARNING)
    return _api


def _serve_on(processors: set[int], serve: Callable[..., None], connection: Connection, *arguments: Any) -> None:
    os.sched_setaffinity(0, processors)
    serve(connection, *arguments)


@contextlib.contextmanager
def process(processors: set[int], serve: Callable[..., None], *arguments: Any) -> Iterator[tuple[Connection, Any]]:
    """Another process that runs ``serve`` on some processors; its first message."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_serve_on, args=(processors, serve, there, *arguments), daemon=True)
    child.start()
    there.close()
    try:
        yield here, here.recv()
    finally:
        here.close()
        child.join(15)
        if child.is_alive():
            child.kill()


# ---- contenders ---------------------------------------------------------------------------------------------------


class Contender(Protocol):
    """Somebody who writes from one process into another's memory."""

    name: str

    def times(self, nbytes: int, writes: int) -> list[float]:
        """Seconds of each of several writes, one after the other."""
        ...


class Memcpy:
    """A copy within one process, which no transfer can beat."""

    name = "memcpy"

    def __init__(self, source: torch.Tensor) -> None:
        self._source = source
        self._target = torch.zeros_like(source)

    def times(self, nbytes: int, writes: int) -> list[float]:
        """Copies between the same two buffers."""
        return [self._write(nbytes) for _ in range(writes)]

    def _write(self, nbytes: int) -> float:
        began = time.perf_counter()
        self._target[:nbytes].copy_(self._source[:nbytes])
        return time.perf_counter() - began


def finish(handle: WriteHandle) -> None:
    """Ask until the write is with the peer."""
    while not handle.poll():
        pass


class Ours:
    """A link of ours.

    Over shm the write *is* the copy into the peer's memory; over the others the encoder has put the bytes into staging
    memory before, as raw NIXL's user has put them into registered memory.
    """

    def __init__(self, transport: str, source: torch.Tensor, peer: tuple[WorkerInfo, Reservation]) -> None:
        self.name = transport
        settings = config(transport)
        self._arena = Arena(settings)
        self.hub = TransportHub("source", self._arena, settings)
        self._source = source
        self._link: Link = self.hub.connect(peer[0])
        self._note = encode_probe()

    def times(self, nbytes: int, writes: int) -> list[float]:
        """Stage, fill where filling is the transfer, submit, ask until it is there."""
        return [self._write(nbytes) for _ in range(writes)]

    def _write(self, nbytes: int) -> float:
        began = time.perf_counter()
        staged = self._link.stage(0, nbytes)
        if self.name == "shm":
            staged.buffer.copy_(self._source[:nbytes])
        finish(staged.submit(self._note))
        return time.perf_counter() - began

    def close(self) -> None:
        """Release everything."""
        self.hub.close()
        self._arena.close()


class Raw:
    """NIXL's Python API: descriptors, a transfer, its state until done, its release; the source is registered."""

    name = "raw nixl"

    def __init__(self, source: torch.Tensor, target: tuple[Connection, tuple[bytes, int]]) -> None:
        api = _nixl()
        self._connection, peer = target
        self._agent = api.nixl_agent("source", api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self._source = source
        self._agent.register_memory(source)
        found = self._agent.add_remote_agent(peer[0])
        self._peer = found.decode() if isinstance(found, bytes) else found
        self._base = peer[1]

    def times(self, nbytes: int, writes: int) -> list[float]:
        """Writes while the target makes progress without pause."""
        self._connection.send("spin")
        try:
            return [self._write(nbytes) for _ in range(writes)]
        finally:
            self._connection.send("stop")
            self._connection.recv()

    def _write(self, nbytes: int) -> float:
        agent = self._agent
        began = time.perf_counter()
        here = agent.get_xfer_descs([(self._source.data_ptr(), nbytes, 0)], "DRAM")
        there = agent.get_xfer_descs([(self._base, nbytes, 0)], "DRAM")
        handle = agent.initialize_xfer("WRITE", here, there, self._peer, b"n")
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            message = f"raw NIXL ended in state {state}"
            raise RuntimeError(message)
        return time.perf_counter() - began


def measure(
    sizes: Sequence[int],
    transports: Sequence[str],
    others: Sequence[Contender] = (),
    *,
    rounds: int = ROUNDS,
    processors: tuple[set[int], set[int]] | None = None,
) -> Samples:
    """Rounds of all contenders, taking turns at each size, so that what else the machine does meets all of them alike.

    Args:
        sizes: bytes of a write.
        transports: ours.
        others: contenders beside memcpy, ours and raw NIXL.
        rounds: how often each takes its turn at each size.
        processors: of this process and of those it writes to; None takes :func:`halves`.
    """
    torch.set_num_threads(1)
    here, there = processors or halves()
    os.sched_setaffinity(0, here)
    samples = Samples()
    source = torch.ones(max(sizes), dtype=torch.uint8)
    with contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, here | there)
        contenders: list[Contender] = [Memcpy(source)]
        for transport in transports:
            _, peer = stack.enter_context(process(there, serve_ours, transport))
            contender = Ours(transport, source, peer)
            stack.callback(contender.close)
            contenders.append(contender)
        contenders.append(Raw(source, stack.enter_context(process(there, serve_raw))))
        contenders.extend(others)
        for _ in range(rounds):
            for nbytes in sizes:
                for taking_turn in contenders:
                    seconds = taking_turn.times(nbytes, writes(nbytes) + _WARM_UP)
                    samples.add(taking_turn.name, nbytes, seconds[_WARM_UP:])
    return samples
