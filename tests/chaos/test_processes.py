"""Worker processes are killed or suspended in the middle of a handoff, and what they held is free afterwards.

Two prefill and two decode workers as processes, no Ray, leases of 1.5 s. The tests run in order and use the workers up:
each leaves behind what the next one needs.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.types import Role
from prismserve.kv_transfer.config import TransferConfig
from prismserve.router.generation import TextDelta
from tests.chaos.worlds import SHORT_LEASE, ask, call_of, kinds, returns_to_baseline, stream, until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]
SCENE = 10_000_700
TOKENS = 400
LONG = {"options": {"max_tokens": TOKENS, "ignore_eos": True}}
TRANSFER = TransferConfig(arena_bytes=32 << 20, link_choice="order", lease_ttl_s=3.0, notify_timeout_s=1.0)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(process_world: Callable[[], Any]) -> AsyncIterator[Any]:
    made = process_world()
    roles = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    await made.add_all(*roles, index=SHORT_LEASE, transfer=TRANSFER, peer_timeout_s=3.0)
    await made.open_router(unregistered_silence_s=1.0)
    await made.wait_connected(4)
    yield made


def living(world: Any, role: str = "") -> list[Any]:
    return [worker for worker in world.workers if worker.alive and worker.worker_id.startswith(role)]


async def forgotten(world: Any, victim: Any) -> None:
    """The index no longer knows the worker, and what the cluster shares is still there."""
    await until(
        lambda: not any(victim.worker_id in key for key in world.index_keys()), 15, "keys of a dead worker stay"
    )
    assert {"incarnation", "epoch", "workers", "events"} <= kinds(world.index_keys())


async def arm(workers: list[Any], number: str, layer: int, folder: Path) -> None:
    """The first of the workers that hands on this layer gets the signal, once."""
    ticket = str(folder / "ticket")
    for worker in workers:
        await worker.call("arm", name=number, layer=layer, ticket=ticket)


async def baseline(world: Any, scene: int, **fields: Any) -> list[int]:
    """What an undisturbed run says, from caches of its own."""
    token_ids, usage = await ask(world, call_of(scene, cache_salt="baseline", **fields))
    assert usage.attempts == 1
    return token_ids


async def test_a_prefill_worker_killed_in_the_middle_of_a_layer_costs_one_more_prefill(
    world: Any, measured: Callable[..., None], tmp_path: Path
) -> None:
    expected = await baseline(world, SCENE)
    victims = living(world, "prefill")
    await arm(victims, "SIGKILL", 3, tmp_path)
    before = {worker.worker_id: (await worker.state())["prefill_tokens"] for worker in living(world)}
    token_ids, usage = await ask(world, call_of(SCENE))
    (survivor,) = living(world, "prefill")
    assert token_ids == expected
    assert usage.attempts == 2
    assert usage.prefill_worker == survivor.worker_id
    computed = (await survivor.state())["prefill_tokens"] - before[survivor.worker_id]
    assert usage.prompt_tokens - 16 <= computed <= usage.prompt_tokens
    await returns_to_baseline(*living(world))
    victim = next(worker for worker in victims if not worker.alive)
    assert victim.process.returncode == -signal.SIGKILL
    await forgotten(world, victim)
    measured(attempts=usage.attempts)


async def test_a_decode_worker_suspended_in_mid_stream_is_fenced(world: Any, measured: Callable[..., None]) -> None:
    """Its stream goes on elsewhere; awake again it has a new epoch, its late tokens reach nobody, and it serves on."""
    expected = await baseline(world, SCENE + 1, **LONG)
    assert len(expected) == TOKENS
    token_ids: list[int] = []
    victim: Any = None
    epoch = 0
    longest_gap_s, heard_s = 0.0, time.monotonic()
    serving = set()
    async for event in stream(world, call_of(SCENE + 1, **LONG)):
        if not isinstance(event, TextDelta):
            continue
        token_ids += event.token_ids
        serving.add(event.decode_worker)
        if victim is None and len(token_ids) >= 40:
            victim = world.worker(event.decode_worker)
            epoch = (await victim.state())["epoch"]
            victim.send_signal(signal.SIGSTOP)
            heard_s = time.monotonic()
        longest_gap_s, heard_s = max(longest_gap_s, time.monotonic() - heard_s), time.monotonic()
    assert token_ids == expected
    assert victim.worker_id in serving
    assert len(serving - {""}) == 2
    victim.send_signal(signal.SIGCONT)
    await until(lambda: _has_newer_epoch(victim, epoch), 10, "a worker that was silent for longer than its lease")
    await world.wait_connected(3)
    await returns_to_baseline(*living(world))
    again = await asyncio.gather(*(ask(world, call_of(SCENE + 1, cache_salt=f"{n}", **LONG)) for n in range(2)))
    assert [token_ids for token_ids, _ in again] == [expected, expected]
    assert {usage.decode_worker for _, usage in again} == {worker.worker_id for worker in living(world, "decode")}
    measured(gap_s=longest_gap_s)


async def _has_newer_epoch(worker: Any, epoch: int) -> bool:
    return bool((await worker.state())["epoch"] > epoch)


async def test_a_prefill_worker_suspended_in_mid_transfer_is_fenced(
    world: Any, measured: Callable[..., None], tmp_path: Path
) -> None:
    """The request is prefilled elsewhere; what the sleeper writes and commits when it wakes up is refused."""
    expected = await baseline(world, SCENE + 2)
    (victim,) = living(world, "prefill")
    before = await victim.state()
    await arm([victim], "SIGSTOP", 2, tmp_path)
    began_s = time.monotonic()
    token_ids, usage = await ask(world, call_of(SCENE + 2))
    waited_s = time.monotonic() - began_s
    assert token_ids == expected
    assert usage.attempts == 2
    assert usage.prefill_worker != victim.worker_id
    # Pages of the first attempt are in quarantine until their lease is over twice; then another request has them.
    await returns_to_baseline(*living(world, "decode"), timeout_s=15)
    other = asyncio.create_task(ask(world, call_of(SCENE + 3)))
    await asyncio.sleep(0.05)
    victim.send_signal(signal.SIGCONT)
    after_wake = (await other)[0]
    await until(lambda: _has_newer_epoch(victim, before["epoch"]), 10)
    await returns_to_baseline(*living(world))
    await world.wait_connected(3)
    assert await baseline(world, SCENE + 3) == after_wake
    measured(recomputed_after_s=waited_s)


async def test_a_decode_worker_killed_while_kv_lands_frees_the_sender(world: Any, tmp_path: Path) -> None:
    """The receiver dies holding blocks of the sender's: they are free again, and the request is answered elsewhere."""
    expected = await baseline(world, SCENE + 4)
    victims = living(world, "decode")
    (sender,) = living(world, "prefill")
    await arm(victims, "SIGKILL", 2, tmp_path)
    token_ids, usage = await ask(world, call_of(SCENE + 4))
    (survivor,) = living(world, "decode")
    assert token_ids == expected
    assert usage.attempts >= 2
    assert usage.decode_worker == survivor.worker_id
    await returns_to_baseline(sender, survivor)
    await forgotten(world, next(worker for worker in victims if not worker.alive))


async def test_a_sender_killed_while_kv_lands_frees_the_receiver(world: Any, tmp_path: Path) -> None:
    """The sender dies holding a lease of the receiver's: its pages and blocks are free again after the lease."""
    expected = await baseline(world, SCENE + 5)
    (victim,), (receiver,) = living(world, "prefill"), living(world, "decode")
    await arm([victim], "SIGKILL", 1, tmp_path)
    token_ids, usage = await ask(world, call_of(SCENE + 5))
    assert token_ids == expected
    assert usage.attempts == 2
    assert usage.decode_worker == receiver.worker_id
    await returns_to_baseline(receiver, timeout_s=2 * TRANSFER.lease_ttl_s + 5)
    await forgotten(world, victim)


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_thirty_seconds_of_suspension_under_the_leases_of_a_cluster(process_world: Callable[[], Any]) -> None:
    """As above with leases as they are by default: a decode worker sleeps for 30 s."""
    world = process_world()
    await world.add_all(Role.PREFILL, Role.DECODE, Role.DECODE)
    await world.open_router()
    await world.wait_connected(3)
    expected = await baseline(world, SCENE + 6, **LONG)
    token_ids: list[int] = []
    victim: Any = None
    epoch = 0
    async for event in stream(world, call_of(SCENE + 6, **LONG)):
        if isinstance(event, TextDelta):
            token_ids += event.token_ids
            if victim is None and len(token_ids) >= 40:
                victim = world.worker(event.decode_worker)
                epoch = (await victim.state())["epoch"]
                victim.send_signal(signal.SIGSTOP)
                stopped_s = time.monotonic()
    assert token_ids == expected
    await asyncio.sleep(max(0.0, stopped_s + 30 - time.monotonic()))
    victim.send_signal(signal.SIGCONT)
    await until(lambda: _has_newer_epoch(victim, epoch), 15)
    await world.wait_connected(3)
    await returns_to_baseline(*world.workers)
