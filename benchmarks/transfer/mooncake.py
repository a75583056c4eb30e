"""Mooncake's transfer engine over TCP, in an environment of its own: two processes, driven over their standard streams."""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.engine.environments import environment, run_quietly

WHEEL: Final = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
LIBRARIES: Final = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")
"""Debian packages that the wheel's library is linked with, RDMA or not."""
_PEER: Final = Path(__file__).with_name("mooncake_peer.py")
_END_S: Final = 10.0


def python(cache: Path) -> Path:
    """The interpreter of Mooncake's environment in a cache folder, made if it is not there yet.

    Raises:
        RuntimeError: it cannot be installed here.
    """
    found = environment(cache / "mooncake", (WHEEL,))
    if ctypes.util.find_library("ibverbs") is None:
        _libraries(cache)
    return found


def _libraries(cache: Path) -> Path:
    """A folder with the libraries that this machine lacks, unpacked and not installed."""
    folder = cache / "mooncake-libraries"
    if not (folder / "done").is_file():
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            message = f"Mooncake needs {', '.join(LIBRARIES)}, and this system has no apt-get to download them"
            raise RuntimeError(message)
        folder.mkdir(parents=True, exist_ok=True)
        run_quietly(["sh", "-c", f"cd '{folder}' && apt-get download {' '.join(LIBRARIES)}"])
        for package in sorted(folder.glob("*.deb")):
            run_quietly(["dpkg", "-x", str(package), str(folder)])
        (folder / "done").touch()
    return folder


def _variables(cache: Path) -> dict[str, str]:
    folders = sorted({str(path.parent) for path in (cache / "mooncake-libraries").rglob("*.so.*")})
    return {**os.environ, "LD_LIBRARY_PATH": ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")]).rstrip(":")}


class Peer:
    """One process with one engine."""

    def __init__(self, interpreter: Path, cache: Path, nbytes: int, processors: set[int]) -> None:
        self._process = subprocess.Popen(
            [interpreter, "-P", _PEER, str(nbytes), ",".join(map(str, sorted(processors)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=_variables(cache),
        )
        told = self._answer()
        self.session: str = told["peer"]
        self.address: int = told["address"]

    def _answer(self) -> Any:
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            message = f"a Mooncake process ended with {self._process.wait(_END_S)}"
            raise RuntimeError(message)
        return json.loads(line)

    def write(self, target: Peer, nbytes: int, writes: int) -> list[float]:
        """Seconds of each of several writes into another's memory."""
        asked = {"peer": target.session, "address": target.address, "nbytes": nbytes, "writes": writes}
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        seconds: list[float] = self._answer()
        return seconds

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Mooncake:
    """A contender of :mod:`benchmarks.transfer.links`."""

    name = "mooncake tcp"

    def __init__(self, source: Peer, target: Peer) -> None:
        self._source, self._target = source, target

    def times(self, nbytes: int, writes: int) -> list[float]:
        """Seconds of each write, timed in the writing process."""
        return self._source.write(self._target, nbytes, writes)


@contextlib.contextmanager
def opened(cache: Path, nbytes: int, processors: tuple[set[int], set[int]]) -> Iterator[Mooncake]:
    """Two engines with ``nbytes`` of registered memory each, on processors of their own; RuntimeError if there are none."""
    interpreter = python(cache)
    with contextlib.ExitStack() as stack:
        peers = []
        for place in processors:
            peers.append(Peer(interpreter, cache, nbytes, place))
            stack.callback(peers[-1].close)
        yield Mooncake(*peers)
