"""What a cluster holds outside itself, and what of it is still there once the cluster has stopped.

A cluster is more than one process tree: Ray's daemons detach, and workers are children of theirs. Everything that one
start brings into being inherits its environment, so a marker variable finds it all and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

# Not PRISMSERVE_*: those are settings, and unknown ones are refused.
MARKER: Final = "SERVED_CLUSTER_MARKER"
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - it is looked at, nothing is created there
_POLL_S: Final = 0.05
_ORPHAN_LOOKS: Final = 2
_ORPHAN_PAUSE_S: Final = 0.3
_CONNECT_TIMEOUT_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What a stopped cluster left behind; each entry is ready to be printed."""

    processes: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()
    shared_memory: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.processes or self.sockets or self.shared_memory or self.files)

    def describe(self) -> str:
        """One line for each thing left, or a sentence that says there is none."""
        kinds = {
            "process": self.processes,
            "socket": self.sockets,
            "shared memory": self.shared_memory,
            "file": self.files,
        }
        lines = [f"{kind}: {entry}" for kind, entries in kinds.items() for entry in entries]
        return "\n".join(lines) or "no process, socket, shared-memory segment or temporary file is left"


class Footprint:
    """Watches what one cluster holds.

    Args:
        marker: value of the environment variable ``MARKER`` that the cluster's first process was started with.
        temporary: the empty folder it was given as ``TMPDIR``.
    """

    def __init__(self, marker: str, temporary: Path) -> None:
        self._marker = marker
        self._temporary = temporary
        self._segments_before = _segments()
        self._segments: set[Path] = set()
        self._socket_files: set[Path] = set()

    def processes(self) -> list[psutil.Process]:
        """The living processes that carry the marker. Zombies hold nothing and are not counted."""
        return [process for process in psutil.process_iter() if _environment(process).get(MARKER) == self._marker]

    def sample(self) -> None:
        """Remember the shared-memory segments and socket files in use now; call while the cluster runs."""
        for process in self.processes():
            self._segments.update(_mapped_segments(process.pid))
            with contextlib.suppress(psutil.Error):
                paths = (str(connection.laddr) for connection in process.net_connections(kind="unix"))
                self._socket_files.update(Path(path) for path in paths if path.startswith("/"))

    def wait_until_gone(self, timeout_s: float) -> bool:
        """Wait for the last marked process to end; False when some are still there after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while self.processes():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def leftovers(self, addresses: Sequence[tuple[str, int]]) -> Leftovers:
        """What is left now.

        Args:
            addresses: host and port of every front door.
        """
        segments = {segment for segment in self._segments if segment.exists()} | self._orphans()
        listening = [f"{host}:{port} still accepts connections" for host, port in addresses if _accepts(host, port)]
        return Leftovers(
            processes=tuple(sorted(_describe(process) for process in self.processes())),
            sockets=(*listening, *sorted(str(path) for path in self._socket_files if path.exists())),
            shared_memory=tuple(sorted(map(str, segments))),
            files=tuple(sorted(map(str, self._temporary.iterdir()))),
        )

    def _orphans(self) -> set[Path]:
        """New segments that nobody holds, now and a moment later: others create and attach theirs meanwhile."""
        new = _segments() - self._segments_before
        for _ in range(_ORPHAN_LOOKS):
            if not new:
                break
            new -= {segment for pid in psutil.pids() for segment in (*_mapped_segments(pid), *_open_segments(pid))}
            time.sleep(_ORPHAN_PAUSE_S)
            new = {segment for segment in new if segment.exists()}
        return new

    def kill(self) -> None:
        """End what is still running, by its process id."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def end_processes_naming(directory: Path, inherited: tuple[str, str], timeout_s: float) -> int:
    """End the processes whose command lines name ``directory`` or what is in it; returns how many there were.

    A start that is interrupted between the birth of a daemon and the note of it leaves one that nobody else ends.

    Args:
        directory: a folder of this cluster alone.
        inherited: name and value of an environment variable that they have from this process, as no editor or pager has
            that somebody opened a log with.
        timeout_s: how long they have after SIGTERM, in seconds, before SIGKILL.
    """
    name, value = inherited
    found = [
        process
        for process in psutil.process_iter()
        if process.pid != os.getpid() and _names(process, directory) and _environment(process).get(name) == value
    ]
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(found, timeout_s)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout_s)
    return len(found)


def _names(process: psutil.Process, directory: Path) -> bool:
    try:
        return any(str(directory) in word for word in process.cmdline())
    except psutil.Error:
        return False


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):  # another user's, or gone meanwhile: not one of ours
        return {}


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120]}"
    except psutil.Error:
        return str(process.pid)


def _segments() -> set[Path]:
    if not _SHARED_MEMORY.is_dir():
        return set()
    return {path for path in _SHARED_MEMORY.iterdir() if _owned(path)}


def _owned(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def _mapped_segments(pid: int) -> Iterator[Path]:
    """Paths under /dev/shm that a process has mapped and that still have a name."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another user's, or gone meanwhile
        return
    for line in lines:
        _, slash, rest = line.partition(f" {_SHARED_MEMORY}/")
        if slash and not rest.endswith(" (deleted)"):
            yield _SHARED_MEMORY / rest


def _open_segments(pid: int) -> Iterator[Path]:
    """Paths under /dev/shm that a process has open."""
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # another user's, or gone meanwhile
        return
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # closed meanwhile
            target = descriptor.readlink()
            if target.is_relative_to(_SHARED_MEMORY):
                yield target


def _accepts(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
