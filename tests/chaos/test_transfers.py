"""Chunks of KV are lost, repeated, shuffled, torn, changed or late on their way between two workers.

A prefill and a decode worker in this process, over each real transport, with chunks of 64 KiB.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.types import Role
from prismserve.kv_transfer.config import TransferConfig
from tests.chaos.wire_faults import Fault, FaultyLink, Flip, Hiccup, Late, Lost, Torn
from tests.chaos.worlds import ask, call_of, until

pytestmark = [pytest.mark.chaos, pytest.mark.asyncio(loop_scope="module")]
SCENE = 10_000_800
CHUNK = 64 << 10


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["nixl", "shm", "nccl"])
async def world(request: Any, open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    made = open_world()
    transfer = TransferConfig(
        arena_bytes=32 << 20,
        transports=(request.param,),
        write_bytes_max=CHUNK,
        coalesce_bytes=CHUNK,
        notify_timeout_s=1.0,
        lease_ttl_s=5.0,
    )
    for role in (Role.PREFILL, Role.DECODE):
        await made.add(role, transfer=transfer)
    await made.open_router()
    await made.wait_connected(2)
    yield made
    await made.close()
    made.router, made.workers = None, []


async def nothing_held(world: Any) -> None:
    """Every lease, page, block and request is over, at both ends."""
    for worker in world.workers:
        hub = worker.hub
        await until(
            lambda worker=worker, hub=hub: (
                not (
                    worker.engine.stats().running
                    or worker.sessions.requests
                    or hub.arena.used_pages
                    or hub.arena.used_staging_pages
                    or worker.receiver.stats.leases_open
                    or worker.engine.stats().kv_blocks_used
                )
            ),
            12,
            "a page, a block or a lease was not given back",
        )
        worker.engine_loop.call(lambda engine: engine.check_integrity()).result(5)


async def undisturbed(world: Any, scene: int) -> list[int]:
    token_ids, usage = await ask(world, call_of(scene, cache_salt="baseline"))
    assert usage.attempts == 1
    assert usage.prefill_worker != usage.decode_worker
    return token_ids


def put(world: Any, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = world.workers[0].hub
    connect = hub.connect
    monkeypatch.setattr(hub, "connect", lambda info: FaultyLink(connect(info), fault))


def lose_every_other(arrived: list[bytes]) -> list[bytes]:
    return arrived[1::2]


def repeat(arrived: list[bytes]) -> list[bytes]:
    return [raw for raw in arrived for _ in range(3)]


class Shuffle:
    """Holds notifications back and gives them out in another order."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self.drawn = random.Random(0)

    def __call__(self, arrived: list[bytes]) -> list[bytes]:
        self.kept += arrived
        if arrived and len(self.kept) < 6:
            return []
        self.drawn.shuffle(self.kept)
        given, self.kept = self.kept, []
        return given


@pytest.mark.parametrize(
    ("number", "change"),
    [(0, lose_every_other), (1, repeat), (2, Shuffle())],
    ids=["drop", "duplicate", "reorder"],
)
async def test_lost_repeated_and_shuffled_notifications_change_nothing(
    world: Any, monkeypatch: pytest.MonkeyPatch, number: int, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    expected = await undisturbed(world, SCENE + number)
    (transport,) = world.workers[1].hub.opened
    poll = transport.poll
    seen: list[int] = []

    def faulty() -> list[bytes]:
        arrived = poll()
        seen.append(len(arrived))
        return change(arrived)

    monkeypatch.setattr(transport, "poll", faulty)
    token_ids, usage = await ask(world, call_of(SCENE + number))
    assert sum(seen) >= 6
    assert token_ids == expected
    assert usage.attempts == 1
    assert usage.prefill_worker == world.workers[0].info.worker_id
    await nothing_held(world)


@pytest.mark.parametrize(
    ("number", "make"),
    [(0, Flip), (1, Torn), (2, partial(Lost, told=True)), (3, partial(Lost, told=False))],
    ids=["one bit flipped", "half a chunk", "a chunk lost", "a chunk and its notification lost"],
)
async def test_damage_is_found_before_use_counted_and_recomputed(
    world: Any, monkeypatch: pytest.MonkeyPatch, number: int, make: Callable[[], Fault]
) -> None:
    """Decode starts only after a complete, verified manifest: the damaged attempt never becomes an answer."""
    scene = SCENE + 10 + number
    expected = await undisturbed(world, scene)
    prefill, decode = world.workers
    failures = decode.receiver.stats.checksum_failures
    # Or the bytes of the undisturbed run, which are the right ones, might still lie where the lost ones should be.
    await nothing_held(world)
    decode.hub.arena.memory[: decode.hub.arena.landing_bytes].fill_(0x5A)
    fault = make()
    put(world, fault, monkeypatch)
    token_ids, usage = await ask(world, call_of(scene))
    assert fault.met
    assert token_ids == expected
    assert usage.attempts == 2
    assert decode.receiver.stats.checksum_failures > failures
    assert prefill.stats().transfer_failures > 0
    await nothing_held(world)
    monkeypatch.undo()
    # What was damaged is nowhere: the caches that came of it say the same again, and the pair is still in service.
    assert (await ask(world, call_of(scene)))[0] == expected
    await undisturbed(world, scene + 100)


async def test_one_transport_error_costs_a_retry_of_the_write_alone(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(world, SCENE + 20)
    fault = Hiccup()
    put(world, fault, monkeypatch)
    for scene in (SCENE + 20, SCENE + 21):
        token_ids, usage = await ask(world, call_of(scene))
        assert usage.attempts == 1
        assert usage.transport == world.workers[0].hub.transports[0]
        assert usage.prefill_worker == world.workers[0].info.worker_id
        assert scene != SCENE + 20 or token_ids == expected
    assert fault.met
    await nothing_held(world)


async def test_an_abort_that_races_a_late_writer_changes_no_other_requests_kv(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write is still under way when its request is cancelled, and lands when its pages belong to another request."""
    scenes = range(SCENE + 31, SCENE + 37)
    expected = {scene: await undisturbed(world, scene) for scene in scenes}
    fault = Late()
    put(world, fault, monkeypatch)
    aborted = asyncio.create_task(ask(world, call_of(SCENE + 30)))
    assert await asyncio.to_thread(fault.under_way.wait, 10)
    aborted.cancel()
    await asyncio.gather(aborted, return_exceptions=True)
    assert await asyncio.to_thread(fault.cancelled.wait, 10)
    writer = threading.Thread(target=_write_soon, args=(fault,))
    answers = [asyncio.create_task(ask(world, call_of(scene))) for scene in scenes]
    await asyncio.sleep(0.02)
    writer.start()
    for scene, (token_ids, _) in zip(scenes, await asyncio.gather(*answers), strict=True):
        assert token_ids == expected[scene]
    await asyncio.to_thread(writer.join, 10)
    await nothing_held(world)
    for scene in scenes:
        assert (await ask(world, call_of(scene)))[0] == expected[scene]


def _write_soon(fault: Late) -> None:
    time.sleep(0.01)
    fault.write()


async def test_cancels_at_any_moment_change_no_other_answer(world: Any) -> None:
    drawn = random.Random(1)
    scenes = range(SCENE + 40, SCENE + 44)
    expected = {scene: await undisturbed(world, scene) for scene in scenes}

    async def cancelled(number: int) -> None:
        task = asyncio.create_task(ask(world, call_of(SCENE + 50 + number % 4, cache_salt=str(number))))
        await asyncio.sleep(drawn.uniform(0.0, 0.4))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for _ in range(3):
        salt = str(drawn.random())
        kept = [asyncio.create_task(ask(world, call_of(scene, cache_salt=salt))) for scene in scenes]
        await asyncio.gather(*(cancelled(number) for number in range(12)))
        for scene, (token_ids, _) in zip(scenes, await asyncio.gather(*kept), strict=True):
            assert token_ids == expected[scene]
    await nothing_held(world)
