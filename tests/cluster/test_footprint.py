"""A cluster's processes are found by their marker, wherever they have gone, and nobody else's are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from prismserve.cluster.footprint import MARKER, Footprint, Leftovers, end_processes_naming

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


@pytest.fixture
def start():
    started = []

    def run(marker: str, command=SLEEP) -> subprocess.Popen:
        process = subprocess.Popen(
            command, env={**os.environ, MARKER: marker}, stdout=subprocess.PIPE, start_new_session=True
        )
        started.append(process)
        assert process.stdout.readline()
        return process

    yield run
    for process in started:
        process.kill()
        process.wait(5)
        process.stdout.close()


def test_processes_are_told_apart_by_their_marker(start, tmp_path):
    mine, other = start("footprint-mine"), start("footprint-other")
    footprint = Footprint("footprint-mine", tmp_path)
    assert [process.pid for process in footprint.processes()] == [mine.pid]
    footprint.kill()
    mine.wait(5)
    assert footprint.wait_until_gone(5.0)
    assert other.poll() is None


def test_waiting_for_what_stays_ends_at_the_deadline(start, tmp_path):
    start("footprint-stays")
    assert not Footprint("footprint-stays", tmp_path).wait_until_gone(0.1)


def test_a_front_door_that_still_answers_is_a_leftover(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        left = Footprint("footprint-door", tmp_path).leftovers([("127.0.0.1", port)])
        assert left.sockets == (f"127.0.0.1:{port} still accepts connections",)
    assert not Footprint("footprint-door", tmp_path).leftovers([("127.0.0.1", port)]).sockets


def test_a_socket_file_that_outlives_its_process_is_a_leftover(start, tmp_path):
    path = tmp_path / "elsewhere.sock"
    code = f"import socket, time; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); print(1, flush=True); "
    process = start("footprint-socket", [sys.executable, "-c", code + "s.listen(); time.sleep(60)"])
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    footprint = Footprint("footprint-socket", temporary)
    footprint.sample()
    process.kill()
    process.wait(5)
    assert footprint.leftovers([]) == Leftovers(sockets=(str(path),))


def test_leftovers_are_described_line_by_line_and_none_as_none():
    assert not Leftovers()
    assert Leftovers().describe().startswith("no process")
    left = Leftovers(processes=("12 raylet",), files=("/tmp/ps/ray",))
    assert left
    assert left.describe() == "process: 12 raylet\nfile: /tmp/ps/ray"


def test_a_daemon_that_nobody_remembers_is_ended_and_a_pager_is_not(start, tmp_path):
    named = [*SLEEP, f"--session-dir={tmp_path}/session"]
    stubborn = [sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN);" + SLEEP[2], str(tmp_path)]
    daemon, deaf = start("footprint-mine", named), start("footprint-mine", stubborn)
    pager, elsewhere = start("", named), start("footprint-mine", [*SLEEP, f"{tmp_path.parent}/other"])
    assert end_processes_naming(tmp_path, (MARKER, "footprint-mine"), 0.5) == 2
    assert None not in (daemon.poll(), deaf.poll())
    assert (pager.poll(), elsewhere.poll()) == (None, None)
    assert end_processes_naming(tmp_path, (MARKER, "footprint-mine"), 0.5) == 0
