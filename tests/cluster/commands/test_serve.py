"""``serve`` says in one sentence why it cannot serve, within seconds, and cleans up after itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prismserve.client import Client
from prismserve.cluster.served import ServedCluster
from prismserve.models.reference import reference_path

pytestmark = pytest.mark.timeout(180)
SECONDS = 45


def serve(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Run ``serve`` until it ends by itself."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "prismserve", "serve", "--port", "0", "--grpc-port", "0", *arguments]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
    assert list(temporary.iterdir()) == []
    assert done.stdout == ""
    return done.returncode, done.stderr.strip()


def one_sentence(status: int, text: str, *words: str) -> None:
    assert status == 1
    assert text.startswith("prismserve: ")
    assert "\n" not in text
    assert "Traceback" not in text
    for word in words:
        assert word in text


def test_a_model_directory_that_is_not_there(tmp_path: Path) -> None:
    one_sentence(*serve(tmp_path, "--model", str(tmp_path / "nothing")), "nothing", "does not exist")


def test_a_checkpoint_with_a_missing_file(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(reference_path(), directory)
    (directory / "model.safetensors").unlink()
    one_sentence(*serve(tmp_path, "--model", str(directory)), "safetensors")


def test_an_architecture_nobody_serves(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(reference_path(), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["SpeechToSmell"]}))
    one_sentence(*serve(tmp_path, "--model", str(directory)), "SpeechToSmell", "LlavaForConditionalGeneration")


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_busy_port(tmp_path: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        one_sentence(*serve(tmp_path, flag, port), port, flag)


def test_too_little_memory(tmp_path: Path) -> None:
    one_sentence(*serve(tmp_path, "--engine-kv-cache-bytes", "9TiB"), "memory")


def test_an_index_server_that_does_not_answer(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        text = serve(tmp_path, "--redis-url", f"redis://:hush@127.0.0.1:{port}")
    one_sentence(*text, str(port))
    assert "hush" not in text[1]


@pytest.mark.parametrize("after_s", [0.5, 3.0])
def test_an_interrupt_while_starting_leaves_nothing(after_s: float) -> None:
    cluster = ServedCluster(ready_timeout_s=60)
    # Where this process ignores SIGINT, as a shell's background jobs do, its child would while it imports.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Exception, match="before it was ready"), _interrupted(cluster, after_s):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    shutdown = cluster.stop()
    assert shutdown.exit_code == 0
    assert not shutdown.leftovers, shutdown.leftovers.describe()


class _interrupted:  # noqa: N801 - reads as a phrase
    """Enter a cluster and send SIGINT while it starts."""

    def __init__(self, cluster: ServedCluster, after_s: float) -> None:
        self._cluster = cluster
        self._after_s = after_s

    def __enter__(self) -> None:
        import threading

        def interrupt() -> None:
            # Its folder is the first thing a start makes; Ray and the imports of its application come in the seconds after.
            deadline = time.monotonic() + 60
            while not (self._cluster._temporary and any(self._cluster._temporary.glob("prismserve-*"))):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(self._after_s)
            self._cluster._process.send_signal(signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        self._cluster.__enter__()

    def __exit__(self, *_: object) -> None:
        self._cluster.stop()


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="Debian's redis-server is not installed")
def test_a_redis_of_ones_own_is_used_and_left_clean(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL) as server:
        try:
            time.sleep(0.5)
            url = f"redis://127.0.0.1:{port}"
            with (
                ServedCluster(
                    ["--redis-url", url, "--mixed-replicas", "1", "--prefill-replicas", "0", "--decode-replicas", "0"]
                ) as cluster,
                Client(cluster.addresses.grpc) as client,
            ):
                assert client.generate("Hello", temperature=0, max_tokens=4).token_ids
                keys = subprocess.run(
                    ["redis-cli", "-p", str(port), "dbsize"], capture_output=True, text=True, check=True
                ).stdout
                assert int(keys) > 0
                shutdown = cluster.stop()
            assert shutdown.clean, shutdown.leftovers.describe()
        finally:
            server.terminate()
