"""A head whose state lies in an external Redis dies and returns: actors that died meanwhile come back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from prismserve.client import Client
from prismserve.cluster.served import ServedCluster
from prismserve.core.errors import PrismServeError
from prismserve.models.reference.scenes import make_scene
from tests.chaos.test_head_death import QUESTION, head_of
from tests.kv_transfer.index.servers import free_port, program, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]
SCENE = 10_001_450
BACK_S = 240.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """An empty Redis for the head's state, without a password."""
    port = free_port()
    command = [program("valkey"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    wait_until(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None)
    yield f"127.0.0.1:{port}"
    process.kill()
    process.wait(10)


@pytest.fixture
def cluster(store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedCluster]:
    monkeypatch.setenv("RAY_REDIS_ADDRESS", store)
    arguments = ["--prefill-replicas", "1", "--decode-replicas", "1", "--fidelity-share", "0"]
    with ServedCluster(arguments, ready_timeout_s=240) as served:
        yield served


def test_a_worker_that_died_without_the_head_comes_back_with_it(
    cluster: ServedCluster, store: str, measured: Callable[..., None]
) -> None:
    picture = make_scene(SCENE)[0]
    ask = {"images": [picture], "temperature": 0, "max_tokens": 32}
    head = head_of(cluster)
    command, environment, folder = head.cmdline(), head.environ(), head.cwd()
    # It chose a port by itself, and has to be found there again.
    ports = {
        word.rpartition(":")[2]
        for process in psutil.Process(head.ppid()).children(recursive=True)
        for word in process.cmdline()
        if word.startswith("--gcs-address=")
    }
    (port,) = ports
    command = [f"--gcs_server_port={port}" if word.startswith("--gcs_server_port=") else word for word in command]
    assert f"--redis_port={store.rpartition(':')[2]}" in command
    with Client(cluster.addresses.grpc) as client:
        expected = client.generate(QUESTION, **ask)
        before = {worker.id: worker for worker in client.status().workers}
        lost = next(worker for worker in before.values() if worker.role == "decode")
        os.kill(head.pid, signal.SIGKILL)
        assert client.generate(QUESTION, **ask).token_ids == expected.token_ids
        os.kill(lost.pid, signal.SIGKILL)
        time.sleep(2)
        returned = subprocess.Popen(command, env=environment, cwd=folder)
        began_s = time.monotonic()
        try:
            while True:
                try:
                    answer = client.generate(QUESTION, timeout_s=20, **ask)
                    break
                except PrismServeError:
                    assert time.monotonic() - began_s < BACK_S, cluster.log_tail()
                    time.sleep(0.5)
            back_s = time.monotonic() - began_s
            assert answer.token_ids == expected.token_ids
            assert answer.usage.decode_worker not in before
            assert answer.usage.prefill_worker in before
            assert returned.poll() is None
        finally:
            cluster.stop()
            returned.kill()
            returned.wait(10)
    measured(answered_again_s=back_s)
