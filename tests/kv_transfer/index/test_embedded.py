"""The embedded server: private, and gone without a trace however its starter ends."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prismserve.core.errors import ConfigurationError
from prismserve.kv_transfer.index.connect import open_index
from prismserve.kv_transfer.index.embedded import EmbeddedServer, find_program

STARTER = """
import sys, time
from prismserve.kv_transfer.index.embedded import EmbeddedServer
server = EmbeddedServer()
server.start()
print(server.port, server.directory, server._running.watchdog.pid, flush=True)
time.sleep(60)
"""


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def within(seconds: float, condition) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def test_it_serves_an_index_and_leaves_nothing_behind(info):
    server = EmbeddedServer()
    server.start()
    watchdog = psutil.Process(server._running.watchdog.pid)
    (program,) = watchdog.children()
    directory, port = server.directory, server.port
    index = await open_index(server.url, "c")
    assert await index.register(info()) > 0
    await index.close()
    assert server.alive()
    server.stop()
    server.stop()
    assert not server.alive()
    assert not directory.exists()
    assert not listening(port)
    assert gone(watchdog.pid)
    assert gone(program.pid)


def test_it_listens_on_loopback_only_and_wants_its_password():
    with EmbeddedServer() as server:
        (program,) = psutil.Process(server._running.watchdog.pid).children()
        addresses = {connection.laddr.ip for connection in program.net_connections() if connection.status == "LISTEN"}
        assert addresses == {"127.0.0.1"}
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            assert connection.recv(100).startswith(b"-NOAUTH")
        assert stat.S_IMODE(server.directory.stat().st_mode) == 0o700
        password = server.url.split(":")[2].split("@")[0]
        for process in (program, psutil.Process(server._running.watchdog.pid)):
            assert password not in " ".join(process.cmdline())
            assert password not in str(process.environ())
        for path in server.directory.iterdir():
            assert password not in path.read_text(errors="replace")


def test_two_servers_have_ports_and_passwords_of_their_own():
    with EmbeddedServer() as one, EmbeddedServer() as two:
        assert one.port != two.port
        assert one.url.split("@")[0] != two.url.split("@")[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_starter_that_is_killed(number):
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3], text=True
    )
    try:
        port, directory, watchdog = starter.stdout.readline().split()
        (program,) = psutil.Process(int(watchdog)).children()
        assert listening(int(port))
        starter.send_signal(number)
        starter.wait(10)
        assert within(5, lambda: gone(int(watchdog)) and gone(program.pid))
        assert not listening(int(port))
        assert not Path(directory).exists()
    finally:
        starter.kill()
        starter.wait(10)
        starter.stdout.close()


def test_the_server_dies_with_a_killed_watchdog():
    server = EmbeddedServer()
    server.start()
    directory = server.directory
    (program,) = psutil.Process(server._running.watchdog.pid).children()
    os.kill(server._running.watchdog.pid, signal.SIGKILL)
    assert within(5, lambda: gone(program.pid))
    assert not server.alive()
    server.stop()
    assert not directory.exists()


def test_an_interrupt_at_the_terminal_does_not_reach_the_server():
    with EmbeddedServer() as server:
        assert os.getsid(server._running.watchdog.pid) != os.getsid(0)


def test_a_program_that_does_not_start_is_reported_with_its_last_words(tmp_path):
    program = tmp_path / "broken-server"
    program.write_text("#!/bin/sh\necho 'cannot serve: out of luck'\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(ConfigurationError, match=r"broken-server.*out of luck"):
        EmbeddedServer(program=program).start()


def test_a_program_that_is_missing_is_reported():
    with pytest.raises(ConfigurationError, match="did not start"):
        EmbeddedServer(program=Path("/nonexistent/server")).start()


def test_a_program_that_never_answers_is_given_up_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    program = tmp_path / "mute-server"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    with pytest.raises(ConfigurationError, match="no answer in time"):
        EmbeddedServer(program=program, start_timeout_s=0.3).start()
    assert [path.name for path in tmp_path.iterdir()] == ["mute-server"]


def test_asking_a_stopped_server_for_its_url_is_refused():
    with pytest.raises(ConfigurationError, match="not running"):
        _ = EmbeddedServer().url


def test_the_packaged_program_is_found():
    assert os.access(find_program(), os.X_OK)
