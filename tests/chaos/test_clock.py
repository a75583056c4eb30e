"""The wall clock jumps by an hour: leases, deadlines and leases' ends do not notice, because they do not look at it."""

from __future__ import annotations

import ast
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.types import Role
from prismserve.kv_transfer.config import TransferConfig
from prismserve.router.generation import TextDelta
from tests.chaos.worlds import SHORT_LEASE, ask, call_of, stream

pytestmark = pytest.mark.chaos
PACKAGE = Path(__file__).resolve().parents[2] / "prismserve"
SCENE = 10_001_000
HOUR_S = 3600.0
# Who may know what time it is, and for what.
READERS = {
    "kv_transfer/index/redis.py",  # the floor under new epochs, which grows whatever the clock does
    "kv_transfer/index/claims.py",  # as above
    "kv_transfer/tiers/disk.py",  # the order in which blocks leave after a restart
    "router/service.py",  # OpenAI's `created`
    "router/openai_format.py",  # OpenAI's `created`
}


def reads_wall_clock(path: Path) -> bool:
    names = {"time": {"time", "time_ns", "localtime", "gmtime"}, "datetime": {"now", "today", "utcnow"}}
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.attr in names.get(node.value.id, ())
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_no_lease_deadline_or_timeout_looks_at_the_wall_clock() -> None:
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if reads_wall_clock(path)}
    served = {name for name in found if not name.startswith(("cluster/", "models/reference/"))}
    assert served == READERS


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    made = open_world()
    transfer = TransferConfig(arena_bytes=32 << 20, link_choice="order", lease_ttl_s=2.0)
    for role in (Role.PREFILL, Role.DECODE):
        await made.add(role, index=SHORT_LEASE, transfer=transfer)
    await made.open_router()
    await made.wait_connected(2)
    yield made


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
async def test_a_jump_in_mid_stream_expires_and_hangs_nothing(
    world: Any, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    options = {"max_tokens": 300, "ignore_eos": True}
    expected, _ = await ask(world, call_of(SCENE, options=options, cache_salt="baseline"))
    epochs = [worker.info.epoch for worker in world.workers]
    real, offset_s = time.time, [0.0]

    def jumped() -> float:
        # gRPC turns a timeout into a wall-clock time and that back into its monotonic clock at once, in C: a jump of
        # the machine's clock moves both, one of Python's function would move the first alone.
        caller = sys._getframe(1).f_globals["__name__"]
        return real() + (0.0 if caller.startswith("grpc.") else offset_s[0])

    monkeypatch.setattr(time, "time", jumped)
    token_ids: list[int] = []
    async for event in stream(world, call_of(SCENE, options=options, cache_salt=f"{jump_s}")):
        if isinstance(event, TextDelta):
            token_ids += event.token_ids
            if len(token_ids) >= 20:
                offset_s[0] = jump_s
        else:
            assert event.usage.attempts == 1
    assert token_ids == expected
    # Longer than a lease: nobody's registration has ended, and nothing that was held has stayed.
    await asyncio.sleep(2 * SHORT_LEASE.lease_ttl_s)
    assert [worker.info.epoch for worker in world.workers] == epochs
    assert all(session.connected for session in world.router.pool.sessions)
    _, usage = await ask(world, call_of(SCENE + 1))
    assert usage.attempts == 1
    for worker in world.workers:
        assert worker.hub.arena.used_pages == 0
        assert worker.receiver.stats.leases_expired == 0
