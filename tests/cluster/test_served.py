"""A cluster in a child process is awaited, stopped, inspected, and never survives its block."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from prismserve.cluster.footprint import MARKER
from prismserve.cluster.served import Addresses, ServedCluster, parse_ready
from prismserve.core.errors import ConfigurationError, DeadlineExceededError, WorkerUnavailableError

# What `serve` promises, and nothing else: listens, says so, ends on SIGTERM.
LISTEN = """
import mmap, os, signal, socket, subprocess, sys, tempfile, time
http, grpc = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("loading", flush=True)
"""
SERVE = """
print(f"ready http=http://127.0.0.1:{http.getsockname()[1]} grpc=127.0.0.1:{grpc.getsockname()[1]}", flush=True)
time.sleep(60)
"""


def fake(*lines: str) -> list[str]:
    """A cluster that does ``lines`` before it is ready."""
    return [sys.executable, "-c", "\n".join([LISTEN, *lines, SERVE])]


def living(marker_value: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == marker_value:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ready http=http://127.0.0.1:8000 grpc=127.0.0.1:9000", Addresses("127.0.0.1:8000", "127.0.0.1:9000")),
        ("ready http=http://[::1]:8000 grpc=[::1]:9000", Addresses("[::1]:8000", "[::1]:9000")),
        ("ready", None),
        ("not ready http=http://127.0.0.1:8000 grpc=127.0.0.1:9000", None),
        ("ready http=http://127.0.0.1 grpc=127.0.0.1:9000", None),
    ],
)
def test_only_the_ready_line_gives_addresses(line, expected):
    assert parse_ready(line) == expected


def test_addresses_are_split_into_hosts_and_ports():
    addresses = Addresses("127.0.0.1:8000", "[::1]:9000")
    assert addresses.base_url == "http://127.0.0.1:8000/v1"
    assert addresses.endpoints() == [("127.0.0.1", 8000), ("::1", 9000)]


def test_a_cluster_that_stops_as_it_must_is_clean():
    with ServedCluster(command=fake(), ready_timeout_s=20) as cluster:
        assert cluster.addresses.http.startswith("127.0.0.1:")
        shutdown = cluster.stop()
    assert shutdown.exit_code == 0
    assert not shutdown.leftovers, shutdown.leftovers.describe()
    assert shutdown.clean
    assert cluster.stop() is shutdown


def test_its_log_is_passed_on_and_kept():
    seen = []
    with ServedCluster(command=fake(), ready_timeout_s=20, on_log=seen.append) as cluster:
        pass
    assert seen[0] == "loading"
    assert "loading" in cluster.log_tail()


def test_ending_before_it_is_ready_is_told_with_its_last_words():
    command = fake("print('no such model', file=sys.stderr); sys.exit(3)")
    with pytest.raises(WorkerUnavailableError, match=r"status 3(.|\n)*no such model"), ServedCluster(command=command):
        pass


def test_not_ready_in_time_is_told_and_it_is_ended():
    cluster = ServedCluster(command=fake("time.sleep(60)"), ready_timeout_s=0.3)
    with pytest.raises(DeadlineExceededError, match="not ready within 0 s"), cluster:
        pass
    assert not living(cluster._footprint._marker)


def test_before_it_starts_there_are_no_addresses_and_nothing_to_stop():
    cluster = ServedCluster(command=["true"])
    with pytest.raises(ConfigurationError, match="not ready"):
        _ = cluster.addresses
    with pytest.raises(ConfigurationError, match="never started"):
        cluster.stop()


def test_a_detached_daemon_left_behind_is_reported_and_killed():
    command = fake(
        "subprocess.Popen(['sleep', '60'], start_new_session=True, stdout=subprocess.DEVNULL,"
        " stderr=subprocess.DEVNULL)",
    )
    with ServedCluster(command=command, ready_timeout_s=20) as cluster:
        marker = cluster._footprint._marker
        assert len(living(marker)) == 2
        shutdown = cluster.stop()
    assert shutdown.exit_code == 0
    assert len(shutdown.leftovers.processes) == 1
    assert "sleep 60" in shutdown.leftovers.describe()
    assert not shutdown.clean
    assert not living(marker)


def test_temporary_files_and_shared_memory_left_behind_are_reported():
    command = fake(
        "open(os.path.join(tempfile.gettempdir(), 'forgotten'), 'w').close()",
        "file = open('/dev/shm/footprint-test-segment', 'w+b'); file.truncate(4096)",
        "view = mmap.mmap(file.fileno(), 4096)",
    )
    try:
        with ServedCluster(command=command, ready_timeout_s=20) as cluster:
            shutdown = cluster.stop()
        assert [path.rpartition("/")[2] for path in shutdown.leftovers.files] == ["forgotten"]
        assert "/dev/shm/footprint-test-segment" in shutdown.leftovers.shared_memory
    finally:
        Path("/dev/shm/footprint-test-segment").unlink(missing_ok=True)
    assert not cluster._temporary.exists()


def test_one_that_ignores_the_signal_is_killed_when_its_time_is_up():
    command = fake("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    with ServedCluster(command=command, ready_timeout_s=20, stop_timeout_s=0.3) as cluster:
        marker = cluster._footprint._marker
    assert cluster.stop().exit_code != 0
    assert not living(marker)


def test_an_error_in_the_block_stops_it_too():
    marker = ""

    def use() -> None:
        nonlocal marker
        with ServedCluster(command=fake(), ready_timeout_s=20) as cluster:
            marker = cluster._footprint._marker
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert not living(marker)
