"""Runs a server program for another process and ends it with that process, however that one dies.

Started as a script with the standard library alone. The first line on standard input is JSON:
``{"program": [...], "input": "...", "directory": "..."}``. The program gets ``input`` on its standard input and runs
in ``directory``. When standard input ends, or the parent changes, or SIGTERM comes, the program is ended (SIGTERM,
SIGKILL after 3 s) and the directory removed. When the program ends by itself, its last output goes to standard error
and this process exits with 3.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5
_GRACE_S = 3.0
_LINE_BYTES_MAX = 65_536
_LOG_BYTES_SHOWN = 2000
EXIT_PROGRAM_ENDED = 3


def _die_with_parent() -> None:
    """In the child, between fork and exec: be killed when this process dies, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _feed(child: subprocess.Popen[bytes], data: bytes) -> None:
    """Hand the program its input; one that already ended is found by whoever watches it."""
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(data)


def _watch(child: subprocess.Popen[bytes], parent: int) -> None:
    """Return when the program has ended or must end."""
    stdin = sys.stdin.fileno()
    while child.poll() is None and os.getppid() == parent:
        ready, _, _ = select.select([stdin], [], [], _POLL_S)
        if ready and not os.read(stdin, 4096):
            return


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _stop(_signal: int, _frame: object) -> None:
    sys.exit(0)


def main() -> int:
    """Run the program until it ends or the parent does."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    order = json.loads(os.read(sys.stdin.fileno(), _LINE_BYTES_MAX))
    directory = Path(order["directory"])
    try:
        signal.signal(signal.SIGTERM, _stop)
        log_path = directory / "server.log"
        with log_path.open("wb") as log:
            child = subprocess.Popen(
                order["program"],
                cwd=directory,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  this process has one thread
            )
        try:
            _feed(child, order["input"].encode())
            _watch(child, parent)
            ended_alone = child.poll() is not None
        finally:
            _end(child)
        if ended_alone:
            sys.stderr.write(log_path.read_text(errors="replace")[-_LOG_BYTES_SHOWN:])
            return EXIT_PROGRAM_ENDED
        return 0
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
