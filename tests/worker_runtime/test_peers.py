"""Workers are found in the registry, and a registry that does not answer holds nobody up."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio
from grpc import aio

from prismserve.core.errors import TransportError, WorkerUnavailableError
from prismserve.core.types import KVLayout, Role, WorkerInfo
from prismserve.protocol import worker_pb2 as pb
from prismserve.protocol.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from prismserve.worker_runtime.peers import FORGET_S, PeerDirectory


def info_of(name, epoch=1, address="127.0.0.1:1"):
    layout = KVLayout("float32", 1, 1, 8, 16)
    return WorkerInfo(name, Role.DECODE, epoch, 1, "n", address, b"", layout, (), b"")


class Slow(WorkerServicer):
    """Grants room when it is told to."""

    def __init__(self):
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()

    async def Reserve(self, request, context):  # noqa: N802
        self.asked.set()
        await self.answers.wait()
        return pb.ReserveReply(granted=True, lease_id=7)


@pytest_asyncio.fixture
async def slow():
    service, server = Slow(), aio.server()
    add_WorkerServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield service
    await server.stop(None)


class Registry:
    def __init__(self, *infos):
        self.infos = infos
        self.answers = asyncio.Event()
        self.answers.set()

    async def workers(self):
        await self.answers.wait()
        return list(self.infos)


async def test_a_known_worker_is_found_at_once_while_the_registry_is_silent():
    now_s = [0.0]
    registry = Registry(info_of("one"))
    peers = PeerDirectory(registry, "secret", lambda: now_s[0])
    first = await peers.find("one", 1)
    registry.answers.clear()
    now_s[0] = 100.0
    async with asyncio.timeout(1):
        for _ in range(3):
            assert await peers.find("one", 1) is first
    registry.infos = (info_of("one", 2),)
    registry.answers.set()
    await asyncio.sleep(0.01)
    assert (await peers.find("one")).info.epoch == 2
    with pytest.raises(WorkerUnavailableError, match="epoch 1"):
        await peers.find("one", 1)
    await peers.close()


async def test_closing_ends_a_refresh_under_way():
    now_s = [0.0]
    registry = Registry(info_of("one"))
    peers = PeerDirectory(registry, "secret", lambda: now_s[0])
    await peers.find("one")
    registry.answers.clear()
    now_s[0] = 100.0
    await peers.find("one")
    async with asyncio.timeout(1):
        await peers.close()


async def refreshed(peers, name):
    """Ask for a worker and wait until what the registry says has been read."""
    await peers.find(name)
    await peers._refreshing


async def test_an_emptied_registry_ends_no_call_and_loses_no_worker_until_it_has_been_empty_for_long(slow):
    now_s = [0.0]
    registry = Registry(info_of("one", address=slow.address))
    peers = PeerDirectory(registry, "secret", lambda: now_s[0])
    peer = await peers.find("one", 1)
    call = asyncio.create_task(peer.reserve(pb.ReserveRequest(), 5))
    await slow.asked.wait()
    registry.infos = ()
    now_s[0] = FORGET_S - 1
    await refreshed(peers, "one")
    assert await peers.find("one", 1) is peer
    now_s[0] = FORGET_S + 1
    await refreshed(peers, "one")
    with pytest.raises(WorkerUnavailableError, match="not registered"):
        await peers.find("one", 1)
    slow.answers.set()
    assert (await call).lease_id == 7
    with pytest.raises(WorkerUnavailableError, match="has left"):
        await peer.reserve(pb.ReserveRequest(), 5)
    await peers.close()


async def test_a_later_epoch_leaves_the_calls_of_the_earlier_one_to_end(slow):
    now_s = [0.0]
    registry = Registry(info_of("one", address=slow.address))
    peers = PeerDirectory(registry, "secret", lambda: now_s[0])
    peer = await peers.find("one", 1)
    call = asyncio.create_task(peer.reserve(pb.ReserveRequest(), 5))
    await slow.asked.wait()
    registry.infos = (info_of("one", 2, slow.address),)
    later = await peers.find("one", 2)
    assert later is not peer
    slow.answers.set()
    assert (await call).granted
    assert (await later.reserve(pb.ReserveRequest(), 5)).granted
    await peers.close()


async def test_a_channel_closed_under_a_call_is_an_error_of_the_call_and_no_cancellation_of_the_caller(slow):
    peers = PeerDirectory(Registry(info_of("one", address=slow.address)), "secret")
    call = asyncio.create_task((await peers.find("one")).reserve(pb.ReserveRequest(), 5))
    await slow.asked.wait()
    await peers.close()
    with pytest.raises(TransportError, match="closed"):
        await call


async def test_a_cancelled_caller_is_cancelled(slow):
    peers = PeerDirectory(Registry(info_of("one", address=slow.address)), "secret")
    call = asyncio.create_task((await peers.find("one")).reserve(pb.ReserveRequest(), 5))
    await slow.asked.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await peers.close()
