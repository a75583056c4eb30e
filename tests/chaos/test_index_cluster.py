"""A whole cluster loses its index and gets it back empty: answers stay the same, shared caches return."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prismserve.client import Client
from prismserve.cluster.served import ServedCluster
from prismserve.models.reference.scenes import make_scene
from tests.kv_transfer.index.servers import Server, program

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(400)]
SCENE = 10_000_500
QUESTION = "Describe the image."
RECOVERY_S = 10.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(program("valkey"), tmp_path_factory.mktemp("valkey"))
    made.start()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def cluster(server: Server) -> Iterator[ServedCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRISMSERVE_REDIS_URL", server.url)
        with ServedCluster(
            ["--prefill-replicas", "1", "--decode-replicas", "1", "--fidelity-share", "0"], ready_timeout_s=240
        ) as served:
            yield served


def ask(cluster: ServedCluster, scene: int) -> Any:
    with Client(cluster.addresses.grpc) as client:
        return client.generate(QUESTION, images=[make_scene(scene)[0]], temperature=0, max_tokens=16)


def router(cluster: ServedCluster) -> dict[str, Any]:
    command = [sys.executable, "-m", "prismserve", "status", "--json", "--grpc", cluster.addresses.grpc]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, Any] = json.loads(done.stdout)["router"]
    return found


def keys_in(server: Server) -> set[str]:
    """Key names without worker ids and epochs."""
    found = re.findall(rb"prismserve:\{[^}]*\}:([a-z:]+)", server.command("KEYS", "*"))
    return {name.decode() for name in found}


def wait(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_answers_are_the_same_without_an_index_and_hits_return_with_it(cluster: ServedCluster, server: Server) -> None:
    """Killed for 3 s and restarted empty: every answer equals its baseline, and the caches are found again in 10 s."""
    baseline = {scene: ask(cluster, scene) for scene in range(SCENE, SCENE + 3)}
    again = ask(cluster, SCENE)
    assert again.usage.cached_tokens > 0
    wait(lambda: router(cluster)["index_keys"] > 0, RECOVERY_S)
    names = keys_in(server)
    server.kill()
    ended_s = time.monotonic() + 3
    while time.monotonic() < ended_s:
        for scene, answer in baseline.items():
            assert ask(cluster, scene).token_ids == answer.token_ids
    fresh = ask(cluster, SCENE + 3)
    server.start()
    back_s = time.monotonic()
    wait(lambda: keys_in(server) == names and router(cluster)["index_synced"], RECOVERY_S)
    assert time.monotonic() - back_s < RECOVERY_S
    for scene, answer in {**baseline, SCENE + 3: fresh}.items():
        repeated = ask(cluster, scene)
        assert repeated.token_ids == answer.token_ids
        assert repeated.usage.cached_tokens >= again.usage.cached_tokens * 0.9
    assert keys_in(server) == names


def test_after_the_cluster_has_stopped_only_what_it_shared_is_left_for_an_hour(
    cluster: ServedCluster, server: Server
) -> None:
    """Stopped in good order: no lease, no entry, no process and no file."""
    shutdown = cluster.stop()
    assert shutdown.clean, shutdown.leftovers.describe()
    assert keys_in(server) <= {"incarnation", "epoch", "workers", "events"}
