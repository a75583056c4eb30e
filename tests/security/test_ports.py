"""Every port and socket a worker and a router open is fed pickles and forgeries; nothing is run, read or written."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import pytest_asyncio

from prismserve.core.types import Role
from prismserve.kv_transfer.config import TransferConfig
from prismserve.protocol import worker_pb2 as pb
from prismserve.protocol.channel import open_channel, secret_metadata
from prismserve.protocol.worker_pb2_grpc import WorkerStub
from prismserve.router.servers import FrontDoors
from tests.chaos.worlds import ask, call_of
from tests.security.doors import CHAT, assert_tells_nothing
from tests.worker_runtime.conftest import SECRET

pytestmark = pytest.mark.asyncio(loop_scope="module")
SCENE = 10_001_600
METHODS = tuple(
    f"/prismserve.{service}/{method}"
    for service, methods in (
        ("v1.Inference", ("Generate", "ListModels", "GetStatus")),
        ("worker.v1.Worker", ("Session", "Reserve", "Commit", "Push")),
    )
    for method in methods
)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    """A real worker that does everything over every transport, and both front doors."""
    made = open_world()
    transfer = TransferConfig(arena_bytes=32 << 20, transports=("nixl", "shm", "nccl"), link_choice="order")
    await made.add(Role.MIXED, transfer=transfer)
    await made.open_router()
    made.doors = FrontDoors(made.router)
    await made.doors.start("127.0.0.1", 0, 0)
    made.expected, _ = await ask(made, call_of(SCENE))
    yield made
    await made.doors.stop()


def pickles(path: Path) -> list[bytes]:
    """Plain, behind the length prefixes of other systems, and as torch and numpy would save it."""
    return [
        framed
        for protocol in (0, 2, 5)
        for raw in [pickle.dumps(Canary(path), protocol)]
        for framed in (
            raw,
            struct.pack(">I", len(raw)) + raw,
            struct.pack("<Q", len(raw)) + raw,
            b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128) + raw,
        )
    ]


def listening() -> list[int]:
    """TCP ports of this process."""
    return sorted(
        {one.laddr.port for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    )


def sang(canary: Path) -> bool:
    return canary.exists()


async def unharmed(world: Any, canary: Path) -> None:
    (worker,) = world.workers
    assert not sang(canary)
    worker.check()
    token_ids, usage = await ask(world, call_of(SCENE))
    assert token_ids == world.expected
    assert usage.attempts == 1
    assert worker.hub.arena.used_pages == 0
    worker.engine_loop.call(lambda engine: engine.check_integrity()).result(5)


async def test_a_pickle_on_any_port_is_dropped(world: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(canary)))
    assert sang(canary), "the canary would sing"
    canary.rmdir()
    ports = listening()
    assert {world.doors.http_port, world.doors.grpc_port} < set(ports)
    # The front doors, the data plane and the store of transport nccl; UCX listens on ports of its own.
    assert len(ports) >= 4
    for port in ports:
        for raw in pickles(canary):
            await asyncio.to_thread(feed, port, raw)
    await unharmed(world, canary)


def feed(port: int, raw: bytes) -> None:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.settimeout(0.05)
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(TimeoutError):
            while connection.recv(4096):
                pass


async def test_a_pickle_as_a_message_of_any_method_is_dropped(world: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (worker,) = world.workers
    for address in (f"127.0.0.1:{world.doors.grpc_port}", worker.info.control_address):
        async with grpc.aio.insecure_channel(address) as channel:
            for method in METHODS:
                for raw in pickles(canary)[::4]:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await channel.unary_unary(method)(raw, metadata=secret_metadata(SECRET), timeout=10)
                    assert_tells_nothing(caught.value.details() or "", worker.info.control_address)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.doors.http_port}") as http:
        for raw in pickles(canary):
            for kind in ("application/octet-stream", "application/x-python-pickle", "application/json"):
                answer = await http.post(CHAT, content=raw, headers={"Content-Type": kind})
                assert answer.status_code == 400
                assert_tells_nothing(answer.text)
    await unharmed(world, canary)


async def test_a_pickle_as_a_notification_is_dropped_and_counted(world: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (worker,) = world.workers
    (shm,) = [transport for transport in worker.hub.opened if transport.name == "shm"]
    refused = worker.receiver.stats.notifications_refused
    sent = pickles(canary)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.connect(f"\0{shm.endpoint()['socket']}")
        for raw in sent:
            await asyncio.to_thread(stranger.send, raw)
    async with asyncio.timeout(5):
        while worker.receiver.stats.notifications_refused < refused + len(sent):
            await asyncio.sleep(0.01)
    await unharmed(world, canary)


async def test_forged_parameters_of_a_transfer_are_refused_and_nothing_is_read_or_written(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even somebody who knows the cluster's secret moves no byte by inventing ids, epochs, blocks or hashes."""
    monkeypatch.setattr("prismserve.decode_workers.landing.SUBMIT_WAIT_S", 0.05)
    (worker,) = world.workers
    info, layout = worker.info, worker.engine.layout.fingerprint()
    arena = worker.hub.arena.memory.clone()
    sent = worker.exchange.counters.sent_bytes
    held = worker.engine.cached_keys()
    manifest = pb.Manifest(version=1, request_id="forged", source_worker=info.worker_id, namespace=bytes(32))
    manifest.layout_fingerprint = layout
    push = {"source_epoch": info.epoch, "layout_fingerprint": layout, "block_keys": b"".join(held[:2])}
    forged = [
        ("Reserve", pb.ReserveRequest(request_id="forged", target_epoch=info.epoch, prompt_tokens=64)),
        ("Reserve", pb.ReserveRequest(request_id="forged", target_epoch=info.epoch + 1, prompt_tokens=1 << 31)),
        ("Commit", pb.CommitRequest(lease_id=1, generation=1, manifest=manifest)),
        ("Commit", pb.CommitRequest(lease_id=2**63 - 1, generation=2**31, manifest=manifest)),
        ("Commit", pb.CommitRequest()),
        ("Push", pb.PushRequest(**push, target_worker="stranger", target_epoch=1)),
        ("Push", pb.PushRequest(**push, target_worker=info.worker_id, target_epoch=info.epoch + 7)),
        ("Push", pb.PushRequest(**{**push, "source_epoch": info.epoch - 1}, target_worker=info.worker_id)),
        ("Push", pb.PushRequest(**{**push, "block_keys": bytes(7)}, target_worker="stranger", target_epoch=1)),
        ("Push", pb.PushRequest(**{**push, "layout_fingerprint": bytes(32)}, target_worker=info.worker_id)),
    ]
    async with open_channel(info.control_address) as channel:
        stub = WorkerStub(channel)
        for method, message in forged:
            reply = await getattr(stub, method)(message, metadata=secret_metadata(SECRET), timeout=10)
            taken = {"Reserve": "granted", "Commit": "accepted", "Push": "found"}[method]
            assert not getattr(reply, taken), (method, message)
            assert reply.refusal
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub, method)(message, metadata=secret_metadata("guessed"), timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert worker.hub.arena.memory.equal(arena)
    assert worker.exchange.counters.sent_bytes == sent
    assert worker.engine.cached_keys() == held
    assert worker.hub.arena.used_pages == 0
    await unharmed(world, tmp_path / "canary")
