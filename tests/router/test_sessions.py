from __future__ import annotations

import asyncio
import dataclasses

import pytest

from prismserve.core.errors import ConfigurationError, OverloadedError, WorkerUnavailableError
from prismserve.core.types import Role, TokenOutput, WorkerState
from prismserve.kv_transfer.index.memory import MemoryIndex, MemoryStore
from prismserve.protocol import worker_pb2 as pb
from prismserve.router.config import RouterConfig
from prismserve.router.mailbox import Mailbox, WorkerLost, WorkerOutput
from prismserve.router.servers import FrontDoors
from prismserve.router.sessions import WorkerPool
from tests.router.scripted import Fabric, Script, ScriptedWorker


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
async def pool_and_worker():
    store = MemoryStore()
    index = MemoryIndex(store)
    worker = await ScriptedWorker("d1", Role.DECODE, Script((5, 6)), Fabric(), index).start()
    registry = {info.worker_id: info for info in await index.workers()}
    config = RouterConfig(
        reconcile_interval_s=0.02, worker_silence_s=0.6, unregistered_silence_s=0.2, max_session_queue=16
    )
    pool = WorkerPool("router-test", lambda: list(registry.values()), lambda _: True, config)
    pool.start()
    yield pool, worker, registry
    await pool.stop()
    await worker.stop()
    await index.close()


async def test_a_worker_of_another_epoch_is_never_connected(pool_and_worker):
    pool, _, registry = pool_and_worker
    await until(lambda: pool.sessions and pool.sessions[0].connected)
    registry["d1"] = dataclasses.replace(registry["d1"], epoch=registry["d1"].epoch + 1)
    await until(lambda: not pool.sessions[0].connected)
    await asyncio.sleep(0.3)
    assert pool.sessions[0].state is WorkerState.LOST


async def test_a_silent_worker_is_lost_and_its_requests_are_told(pool_and_worker):
    pool, _, _ = pool_and_worker
    await until(lambda: pool.sessions and pool.sessions[0].connected)
    box = Mailbox("r", 0, 10)
    pool.session("d1").attach(box)
    assert await box.get(5) == WorkerLost("d1")


async def test_a_worker_that_left_the_registry_is_dropped_only_when_silent(pool_and_worker):
    pool, _, registry = pool_and_worker
    await until(lambda: pool.sessions and pool.sessions[0].connected)
    registry.clear()
    await asyncio.sleep(0.05)
    assert pool.sessions
    await until(lambda: not pool.sessions)
    with pytest.raises(WorkerUnavailableError):
        pool.session("d1")


async def test_the_worker_is_found_again_after_a_restart(pool_and_worker):
    pool, worker, registry = pool_and_worker
    await until(lambda: pool.sessions and pool.sessions[0].connected)
    await worker.stop()
    await until(lambda: not pool.sessions[0].connected)
    index = worker.index
    again = await ScriptedWorker("d1", Role.DECODE, Script((5,)), Fabric(), index).start()
    registry.update({info.worker_id: info for info in await index.workers()})
    await until(lambda: pool.sessions[0].connected)
    await again.stop()


async def test_a_slow_reader_costs_one_event_and_tokens_are_bounded():
    box = Mailbox("r", 0, 5)
    for token in range(5):
        assert box.put(WorkerOutput("d", TokenOutput("r", 0, (token,))))
    assert not box.put(WorkerOutput("d", TokenOutput("r", 0, (9,))))
    event = await box.get(1)
    assert event.output.token_ids == (0, 1, 2, 3, 4)
    with pytest.raises(TimeoutError):
        await box.get(0.01)


async def test_a_congested_session_refuses_requests_and_never_a_cancellation(pool_and_worker):
    pool, worker, _ = pool_and_worker
    await until(lambda: pool.sessions and pool.sessions[0].connected)
    session = pool.session("d1")
    boxes = [Mailbox(f"r{number}", 0, 5) for number in range(3)]
    for box in boxes:
        session.attach(box)
    for _ in range(16):
        session.submit(pb.Submit())
    with pytest.raises(OverloadedError):
        session.submit(pb.Submit())
    for box in boxes:
        session.cancel(box)
        session.cancel(box)
    assert not session.in_flight
    await until(lambda: len(worker.cancels) == 3)
    assert [ref[0] for ref in worker.cancels] == ["r0", "r1", "r2"]


async def test_a_busy_port_is_one_clear_sentence_and_nothing_stays_bound(start_cluster):
    cluster = await start_cluster(())
    doors = FrontDoors(cluster.service)
    with pytest.raises(ConfigurationError, match=r"cannot listen on 127\.0\.0\.1") as caught:
        await doors.start("127.0.0.1", cluster.doors.http_port, 0)
    assert caught.value.field == "port"
    with pytest.raises(ConfigurationError, match=r"cannot listen on 127\.0\.0\.1") as caught:
        await doors.start("127.0.0.1", 0, cluster.doors.grpc_port)
    assert caught.value.field == "grpc_port"
