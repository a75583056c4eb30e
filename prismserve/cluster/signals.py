"""Signals as exceptions in the main thread, for commands that must tidy up whatever ends them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from prismserve.core.errors import DeadlineExceededError


@contextmanager
def handled(name: signal.Signals, handler: Callable[[int, object], NoReturn]) -> Iterator[None]:
    """Handle a signal for the length of a block."""
    old = signal.signal(name, handler)
    try:
        yield
    finally:
        signal.signal(name, old)


@contextmanager
def deferred(*names: signal.Signals) -> Iterator[None]:
    """Let a block end before a signal ends the process; for imports, which may swallow the exception of one.

    Raises:
        SystemExit: (on leaving) one has come; the status is the shell's for it.
    """
    came: list[int] = []
    old = {name: signal.signal(name, lambda number, _frame: came.append(number)) for name in names}
    try:
        yield
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)
    if came:
        sys.exit(128 + came[0])


@contextmanager
def deadline(timeout_s: float) -> Iterator[None]:
    """Raise DeadlineExceededError in the main thread when the block takes longer than ``timeout_s``."""

    def expire(_signal: int, _frame: object) -> NoReturn:
        message = f"this did not finish within {timeout_s:.0f} s"
        raise DeadlineExceededError(message)

    with handled(signal.SIGALRM, expire):
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def terminate(number: int, _frame: object) -> NoReturn:
    """Handler that ends the process in order: ``with`` blocks and ``finally`` run, the status is the shell's for it."""
    sys.exit(128 + number)
