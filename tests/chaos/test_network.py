"""A bad line between two workers: 200 ms of delay, 5 % of packets lost, 1 Mbit/s; then no line at all."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.types import Role
from prismserve.kv_transfer.config import TransferConfig
from tests.chaos.network import Condition, Namespaces, namespaces
from tests.chaos.worlds import ProcessWorld, ask, call_of, returns_to_baseline
from tests.kv_transfer.index.servers import QUOTED, Server, program

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]
SCENE = 10_001_500
BAD = Condition(delay_s=0.2, loss=0.05, bits_per_s=1e6)
PEER_S = 3.0
KV_WAIT_S = 4.0
TRANSFER = {"arena_bytes": 32 << 20, "lease_ttl_s": 6.0, "write_timeout_s": 2.0, "notify_timeout_s": 1.0}


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Namespaces]:
    with namespaces() as made:
        yield made


@pytest.fixture(scope="module")
def server(two_hosts: Namespaces, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Reachable from both hosts over their good lines."""
    made = Server(program("valkey"), tmp_path_factory.mktemp("valkey"), f"bind 127.0.0.1 {two_hosts.gateway}")
    made.start()
    yield made
    made.kill()


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["nixl", "nccl"])
async def world(request: Any, two_hosts: Namespaces, server: Server) -> AsyncIterator[ProcessWorld]:
    """A prefill worker on one host, a decode worker on the other."""
    made = ProcessWorld(server.url, f"network-{request.param}")
    url = f"redis://:{QUOTED}@{two_hosts.gateway}:{server.port}"
    for side, role in enumerate((Role.PREFILL, Role.DECODE)):
        await made.add(
            role,
            prefix=("env", "UCX_TLS=tcp,self", *two_hosts.prefix(side)),
            index_url=url,
            host=two_hosts.hosts[side],
            transfer=TransferConfig(transports=(request.param,), **TRANSFER),
            peer_timeout_s=PEER_S,
            kv_wait_timeout_s=KV_WAIT_S,
        )
    await made.open_router()
    await made.wait_connected(2)
    yield made
    two_hosts.wire.condition = Condition()
    await made.close()


async def test_over_a_good_line_kv_crosses(world: ProcessWorld, two_hosts: Namespaces) -> None:
    """What the other tests rely on: the bytes do take this way."""
    before = two_hosts.wire.carried[0]
    _, usage = await ask(world, call_of(SCENE))
    assert usage.attempts == 1
    assert usage.prefill_worker == world.workers[0].worker_id
    assert two_hosts.wire.carried[0] - before >= usage.kv_bytes_sent > 500_000


@pytest.mark.parametrize("condition", [BAD, Condition(loss=1.0)], ids=["bad", "cut"])
async def test_over_a_bad_line_deadlines_hold_and_the_request_is_computed_elsewhere(
    world: ProcessWorld,
    two_hosts: Namespaces,
    condition: Condition,
    measured: Callable[..., None],
) -> None:
    scene = SCENE + 1 + (condition is BAD)
    expected, usage = await ask(world, call_of(scene, cache_salt="baseline"))
    assert usage.attempts == 1
    two_hosts.wire.condition = condition
    try:
        began_s = time.monotonic()
        token_ids, usage = await ask(world, call_of(scene))
        took_s = time.monotonic() - began_s
        assert token_ids == expected
        assert usage.attempts == 2
        assert usage.prefill_worker != world.workers[0].worker_id
        # The reservation, the last write and the commit each have their deadline; then it is computed anew.
        assert took_s < KV_WAIT_S + 3 * PEER_S
        await returns_to_baseline(*world.workers, timeout_s=2 * TRANSFER["lease_ttl_s"] + 5)
    finally:
        two_hosts.wire.condition = Condition()
    measured(answered_after_s=took_s, packets_lost=two_hosts.wire.lost)
