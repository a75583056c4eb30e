"""The head of the Ray cluster (GCS) dies: living replicas answer what is under way and what is new."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from prismserve.client import Client
from prismserve.cluster.footprint import MARKER
from prismserve.cluster.served import ServedCluster
from prismserve.models.reference.scenes import make_scene

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]
SCENE = 10_001_400
QUESTION = "Describe the image."
LONG = {"temperature": 0, "max_tokens": 600, "ignore_eos": True}
WITHOUT_HEAD_S = 20.0
SHARE_OF_A_CORE = 0.2
"""What the process that started the cluster may use while its head is gone; one that polls without rest takes a whole core."""
STOP_S = 40.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[ServedCluster]:
    with ServedCluster(
        ["--prefill-replicas", "1", "--decode-replicas", "1", "--fidelity-share", "0"], ready_timeout_s=240
    ) as served:
        yield served


def head_of(cluster: ServedCluster) -> psutil.Process:
    (found,) = [
        process
        for process in psutil.Process(cluster._process.pid).children(recursive=True)
        if process.name().startswith("gcs_server")
    ]
    assert found.environ()[MARKER]
    return found


def test_requests_under_way_and_new_ones_are_answered_without_the_head(
    cluster: ServedCluster, measured: Callable[..., None]
) -> None:
    picture, other = make_scene(SCENE)[0], make_scene(SCENE + 1)[0]
    with Client(cluster.addresses.grpc) as client:
        expected = client.generate(QUESTION, images=[picture], **LONG)
        short = client.generate(QUESTION, images=[other], temperature=0, max_tokens=32)
        head = head_of(cluster)
        token_ids: list[int] = []
        gaps: list[float] = []
        heard_s = time.monotonic()
        killed = False
        for delta in client.stream(QUESTION, images=[picture], **LONG):
            gaps.append(time.monotonic() - heard_s)
            heard_s = time.monotonic()
            token_ids += delta.token_ids
            if not killed and len(token_ids) >= 40:
                os.kill(head.pid, signal.SIGKILL)
                killed = True
        assert killed
        assert token_ids == list(expected.token_ids)
        assert max(gaps[1:]) < 2.0
        starter = psutil.Process(cluster._process.pid)
        used_s, began_s = sum(starter.cpu_times()[:2]), time.monotonic()
        until_s = began_s + WITHOUT_HEAD_S
        asked = 0
        while time.monotonic() < until_s:
            # The image again, which is cached, and one that nobody has seen: both need router and workers only.
            fresh = make_scene(SCENE + 10 + asked)[0]
            assert client.generate(QUESTION, images=[other], temperature=0, max_tokens=32).token_ids == short.token_ids
            answer = client.generate(QUESTION, images=[fresh], temperature=0, max_tokens=32)
            assert answer.usage.prefill_worker != answer.usage.decode_worker
            asked += 1
            time.sleep(0.2)
        assert asked >= 5
        assert not psutil.pid_exists(head.pid) or head.status() == psutil.STATUS_ZOMBIE
    share = (sum(starter.cpu_times()[:2]) - used_s) / (time.monotonic() - began_s)
    assert share < SHARE_OF_A_CORE
    stopped = cluster.stop()
    assert stopped.exit_code == 0
    assert stopped.duration_s < STOP_S
    assert not stopped.leftovers, stopped.leftovers.describe()
    measured(
        answers_without_head=2 * asked, longest_gap_s=max(gaps[1:]), share_of_a_core=share, stopped_s=stopped.duration_s
    )
