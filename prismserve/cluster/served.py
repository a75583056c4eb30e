"""A cluster in a child process: started, awaited, stopped and inspected. The demo and the benchmarks stand on it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from prismserve.cluster.footprint import MARKER, Footprint, Leftovers
from prismserve.core.errors import ConfigurationError, DeadlineExceededError, WorkerUnavailableError

_READY: Final = re.compile(r"ready http=http://(?P<http>\S+:\d+)/? grpc=(?P<grpc>\S+:\d+)\s*")
_POLL_S: Final = 0.05
_SAMPLE_INTERVAL_S: Final = 5.0
_GONE_TIMEOUT_S: Final = 3.0
_LOG_LINES: Final = 400
_TAIL_LINES: Final = 25
# Ray puts sockets a hundred characters deep under TMPDIR, and a socket's path may have 107.
_TEMPORARY_ROOT_CHARS: Final = 16


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a cluster answers, each as ``host:port``."""

    http: str
    grpc: str

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as ``base_url``."""
        return f"http://{self.http}/v1"

    def endpoints(self) -> list[tuple[str, int]]:
        """Host and port of each front door."""
        pairs = (address.rpartition(":") for address in (self.http, self.grpc))
        return [(host.strip("[]"), int(port)) for host, _, port in pairs]


@dataclass(frozen=True, slots=True)
class Shutdown:
    """How a cluster ended.

    Attributes:
        exit_code: of ``prismserve serve``; negative for the signal that ended it.
        duration_s: from the signal until the process had ended, in seconds.
        leftovers: what was still there a moment later.
    """

    exit_code: int
    duration_s: float
    leftovers: Leftovers

    @property
    def clean(self) -> bool:
        """It ended by itself, with status 0, and nothing is left."""
        return self.exit_code == 0 and not self.leftovers


def parse_ready(line: str) -> Addresses | None:
    """The addresses in the line ``serve`` prints when it can serve; None for any other line."""
    match = _READY.fullmatch(line)
    return Addresses(http=match["http"], grpc=match["grpc"]) if match else None


def serve_command(arguments: Sequence[str]) -> list[str]:
    """Command line of ``prismserve serve`` in this interpreter, on ports the system chooses."""
    return [sys.executable, "-m", "prismserve", "serve", "--port", "0", "--grpc-port", "0", *arguments]


class ServedCluster:
    """``prismserve serve`` as a child, for use in a ``with`` block; leaving the block stops it at any price.

    Args:
        arguments: further flags of ``prismserve serve``.
        ready_timeout_s: how long it may take until it can serve, in seconds.
        stop_timeout_s: how long it may take to stop after SIGTERM, in seconds.
        on_log: called with each line the cluster logs, from another thread.
        command: what to run instead of ``prismserve serve``.

    Raises:
        WorkerUnavailableError: (on entering) it ended before it could serve; the message ends with its last lines.
        DeadlineExceededError: (on entering) it could not serve in time.
    """

    def __init__(
        self,
        arguments: Sequence[str] = (),
        *,
        ready_timeout_s: float = 120.0,
        stop_timeout_s: float = 60.0,
        on_log: Callable[[str], None] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self._command = list(command) if command is not None else serve_command(arguments)
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._on_log = on_log
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._addresses: Addresses | None = None
        self._process: subprocess.Popen[str] | None = None
        self._footprint: Footprint | None = None
        self._temporary: Path | None = None
        self._readers: list[threading.Thread] = []
        self._watcher: threading.Thread | None = None
        self._stopping = threading.Event()
        self._shutdown: Shutdown | None = None

    @property
    def addresses(self) -> Addresses:
        """Where it answers."""
        if self._addresses is None:
            message = "the cluster is not ready: use it inside its `with` block"
            raise ConfigurationError(message)
        return self._addresses

    def log_tail(self) -> str:
        """The last lines it logged."""
        return "\n".join(list(self._log)[-_TAIL_LINES:])

    def __enter__(self) -> Self:
        self._temporary = _temporary_folder()
        marker = secrets.token_hex(16)
        self._footprint = Footprint(marker, self._temporary)
        environment = {**os.environ, MARKER: marker, "TMPDIR": str(self._temporary), "PYTHONUNBUFFERED": "1"}
        environment.pop("RAY_TMPDIR", None)  # Ray prefers it to TMPDIR
        try:
            self._process = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # the terminal's Ctrl-C is ours to pass on
            )
            self._readers = [_start(self._read, stream) for stream in (self._process.stdout, self._process.stderr)]
            self._watcher = _start(self._watch)
            self._await_ready(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> Shutdown:
        """Send SIGTERM, wait, and look at what is left; what does not end in time is killed. Safe to call twice."""
        if self._shutdown is not None:
            return self._shutdown
        if self._footprint is None or self._temporary is None:
            message = "the cluster was never started"
            raise ConfigurationError(message)
        process, footprint = self._process, self._footprint
        began = time.monotonic()
        exit_code = -1
        if process is not None:
            if process.poll() is None:
                footprint.sample()
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                exit_code = process.wait(self._stop_timeout_s)
        duration_s = time.monotonic() - began
        self._stopping.set()
        footprint.wait_until_gone(_GONE_TIMEOUT_S)
        if self._watcher is not None:
            self._watcher.join(_GONE_TIMEOUT_S)
        leftovers = footprint.leftovers(self._addresses.endpoints() if self._addresses else [])
        footprint.kill()
        if process is not None:
            self._release(process)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._shutdown = Shutdown(exit_code=exit_code, duration_s=duration_s, leftovers=leftovers)
        return self._shutdown

    def _release(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait(_GONE_TIMEOUT_S)
        for reader in self._readers:
            reader.join(_GONE_TIMEOUT_S)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            text = line.rstrip("\n")
            addresses = parse_ready(text)
            if addresses is not None:
                self._addresses = addresses
            self._log.append(text)
            if self._on_log is not None:
                self._on_log(text)

    def _watch(self) -> None:
        footprint = self._footprint
        while footprint is not None and not self._stopping.wait(_SAMPLE_INTERVAL_S):
            footprint.sample()

    def _await_ready(self, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while self._addresses is None:
            if process.poll() is not None:
                for reader in self._readers:
                    reader.join(_GONE_TIMEOUT_S)
                message = f"the cluster ended with status {process.returncode} before it was ready:\n{self.log_tail()}"
                raise WorkerUnavailableError(message)
            if time.monotonic() >= deadline:
                message = f"the cluster was not ready within {self._ready_timeout_s:.0f} s:\n{self.log_tail()}"
                raise DeadlineExceededError(message)
            time.sleep(_POLL_S)


def _start(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True, name="served-cluster")
    thread.start()
    return thread


def _temporary_folder() -> Path:
    root = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="ps-", dir=root if len(root) <= _TEMPORARY_ROOT_CHARS else "/tmp")  # noqa: S108
    return Path(folder)
