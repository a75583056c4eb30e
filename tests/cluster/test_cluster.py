"""One real cluster, as a user starts it: Ray, index, router, one prefill and one decode worker as processes."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from prismserve.client import Client
from prismserve.cluster.served import ServedCluster
from prismserve.core.cores import visible_cores
from prismserve.models.reference.scenes import make_scene

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).resolve().parents[2]
SCENE = 10_000_300


@pytest.fixture(scope="module")
def cluster() -> Iterator[ServedCluster]:
    """Shared by the tests of this file; the last one stops it."""
    # Replays would move the counters that the tests read.
    with ServedCluster(["--fidelity-share", "0"]) as served:
        yield served


@pytest.fixture(scope="module")
def client(cluster: ServedCluster) -> Iterator[openai.OpenAI]:
    """The official package."""
    with openai.OpenAI(base_url=cluster.addresses.base_url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def picture(scene: int) -> bytes:
    stream = io.BytesIO()
    make_scene(scene)[0].save(stream, "PNG")
    return stream.getvalue()


def turn(scene: int, question: str) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(picture(scene)).decode()
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}],
    }


def ask(client: openai.OpenAI, scene: int, question: str, **options: Any) -> Any:
    return client.chat.completions.create(
        model="reference", messages=[turn(scene, question)], temperature=0, max_tokens=32, **options
    )


def status(cluster: ServedCluster) -> dict[str, Any]:
    command = [sys.executable, "-m", "prismserve", "status", "--json", "--grpc", cluster.addresses.grpc]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_answers_are_right_streamed_or_not(client: openai.OpenAI) -> None:
    right = 0
    questions = make_scene(SCENE)[1][:4]
    for _, question, expected in questions:
        whole = ask(client, SCENE, question)
        parts = list(ask(client, SCENE, question, stream=True, stream_options={"include_usage": True}))
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert text == whole.choices[0].message.content
        assert whole.choices[0].finish_reason == "stop"
        assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
        right += text == expected
    assert right >= len(questions) - 1


def test_the_usage_block_tells_who_did_what(client: openai.OpenAI) -> None:
    plan = {"visual": {"method": "visionzip", "keep": 49}, "wire": {"codec": "int8"}}
    usage = ask(client, SCENE + 1, "Describe the image.", extra_body={"compression": plan}).usage
    report = usage.model_extra["prismserve"]
    assert (report["visual_tokens_before"], report["visual_tokens_after"]) == (196, 49)
    assert 0 < report["kv_bytes_sent"] < report["kv_bytes_after"] < report["kv_bytes_before"]
    assert report["transport"] in {"nixl", "shm"}
    assert report["prefill_worker"].startswith("prefill-")
    assert report["decode_worker"].startswith("decode-")


def test_workers_are_processes_of_their_own(cluster: ServedCluster) -> None:
    workers = status(cluster)["workers"]
    threads = [worker["stats"]["threads"] for worker in workers]
    assert min(threads) >= 1
    assert sum(threads) <= max(len(workers), visible_cores()), "they would fight over the cores"
    assert sorted(worker["role"] for worker in workers) == ["decode", "prefill"]
    assert len({worker["pid"] for worker in workers}) == 2
    for worker in workers:
        assert {"id", "role", "pid", "node", "state", "epoch"} <= worker.keys()
        assert "ServeReplica" in " ".join(psutil.Process(worker["pid"]).cmdline())


def test_both_front_doors_say_the_same(cluster: ServedCluster, client: openai.OpenAI) -> None:
    with Client(cluster.addresses.grpc) as sdk:
        answer = sdk.generate("Describe the image.", images=[picture(SCENE + 2)], temperature=0, max_tokens=32)
    assert answer.text == ask(client, SCENE + 2, "Describe the image.").choices[0].message.content


def test_several_images_and_turns(client: openai.OpenAI) -> None:
    first = turn(SCENE + 3, "Describe the image.")
    said = ask(client, SCENE + 3, "Describe the image.").choices[0].message.content
    again = client.chat.completions.create(
        model="reference",
        messages=[first, {"role": "assistant", "content": said}, turn(SCENE + 4, "How many shapes are there?")],
        temperature=0,
        max_tokens=8,
    )
    report = again.usage.model_extra["prismserve"]
    assert report["images"] == 2
    assert report["visual_tokens_before"] == 392
    assert again.usage.prompt_tokens_details.cached_tokens >= 192


def test_eight_clients_at_once_get_what_they_get_one_by_one(client: openai.OpenAI) -> None:
    questions = [(SCENE + 10 + i % 3, make_scene(SCENE + 10 + i % 3)[1][i % 4][1]) for i in range(16)]

    def one(item: tuple[int, str]) -> str:
        return str(ask(client, *item).choices[0].message.content)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, questions))
    assert together == [one(item) for item in questions]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": "no"}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "temperature": float("nan")}, "temperature"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "compression": "shrink"}, "compression"),
        ({"messages": [turn(SCENE, "x")] * 17}, "image"),
    ],
)
def test_a_bad_request_is_answered_400_and_the_cluster_serves_on(
    cluster: ServedCluster, client: openai.OpenAI, body: dict[str, Any], field: str
) -> None:
    request = urllib.request.Request(
        f"{cluster.addresses.base_url}/chat/completions",
        json.dumps({"model": "reference", **body}).encode(),
        {"content-type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == 400
    error = json.load(caught.value)["error"]
    assert field in json.dumps(error)
    assert "/" not in error["message"].replace("and/or", "")
    assert ask(client, SCENE, "Describe the image.").choices[0].message.content


def test_the_chat_command_answers(cluster: ServedCluster, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    path.write_bytes(picture(SCENE))
    _, question, expected = make_scene(SCENE)[1][0]
    command = [sys.executable, "-m", "prismserve", "chat", "--grpc", cluster.addresses.grpc, str(path), question]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert expected in done.stdout


def test_the_curl_example_of_the_readme_works(cluster: ServedCluster) -> None:
    readme = (ROOT / "README.md").read_text()
    match = re.search(r"```sh\n(IMAGE=.*?)\n```", readme, re.DOTALL)
    assert match is not None
    script = match[1].replace("http://127.0.0.1:8000", f"http://{cluster.addresses.http}")
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] == "a red circle and a cyan square"


def test_metrics_carry_the_names_of_the_field(cluster: ServedCluster) -> None:
    with urllib.request.urlopen(f"http://{cluster.addresses.http}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "kv_cache_usage_perc",
        "prefix_cache_hits",
    ):
        assert name in text


def test_requests_go_on_when_the_prefill_worker_is_killed(cluster: ServedCluster, client: openai.OpenAI) -> None:
    said = ask(client, SCENE + 20, "Describe the image.").choices[0].message.content
    worker = next(worker for worker in status(cluster)["workers"] if worker["role"] == "prefill")
    os.kill(worker["pid"], signal.SIGKILL)
    assert ask(client, SCENE + 20, "Describe the image.").choices[0].message.content == said
    other = ask(client, SCENE + 21, "Describe the image.")
    assert other.choices[0].message.content
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        now = [one for one in status(cluster)["workers"] if one["role"] == "prefill" and one["state"] == "ready"]
        if now and now[0]["pid"] != worker["pid"]:
            break
        time.sleep(1)
    else:
        pytest.fail("the prefill worker was not replaced")
    fresh = ask(client, SCENE + 22, "Describe the image.").usage.model_extra["prismserve"]
    assert fresh["prefill_worker"] != worker["id"]


def test_a_stop_signal_leaves_nothing(cluster: ServedCluster) -> None:
    shutdown = cluster.stop()
    assert shutdown.exit_code == 0, cluster.log_tail()
    assert not shutdown.leftovers, shutdown.leftovers.describe()
    assert shutdown.duration_s < 30
