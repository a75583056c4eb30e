"""The one thread of a worker that encodes and writes: takes turns between transfers, never blocks on one of them."""

from __future__ import annotations

import enum
import logging
import threading
from typing import Final, Protocol

from prismserve.core.errors import TransferError

_PAUSE_MIN_S: Final = 0.00005
_PAUSE_MAX_S: Final = 0.001
_LOOK_S: Final = 0.1
_JOIN_S: Final = 10.0
_log = logging.getLogger(__name__)


class Turn(enum.IntEnum):
    """What a transfer did with its turn, ascending by how soon it wants the next."""

    OVER = 0
    IDLE = 1
    WAITING = 2
    WORKED = 3


class Work(Protocol):
    """A transfer as the loop sees it."""

    def advance(self) -> Turn:
        """Do one bounded piece of work without blocking."""
        ...

    def fail(self, error: BaseException) -> None:
        """End it with an error."""
        ...


class SendLoop:
    """Round robin over the transfers that are open.

    Args:
        name: of the thread, which starts with the first transfer.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._wake = threading.Condition()
        self._works: list[Work] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._notified = False

    def add(self, work: Work) -> None:
        """Give a transfer turns until it is over; TransferError once closed."""
        with self._wake:
            if self._closed:
                message = "the worker is shutting down and sends no more KV"
                raise TransferError(message)
            self._works.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._notified = True
            self._wake.notify()

    def wake(self) -> None:
        """Say that a transfer has something to do."""
        with self._wake:
            self._notified = True
            self._wake.notify()

    def close(self, timeout_s: float = _JOIN_S) -> None:
        """End the thread and fail what is open. TransferError if the thread does not end in time."""
        with self._wake:
            self._closed = self._notified = True
            self._wake.notify()
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
            if thread.is_alive():
                message = f"the send thread did not end within {timeout_s} s"
                raise TransferError(message)

    def _run(self) -> None:
        pause_s = _PAUSE_MIN_S
        while True:
            with self._wake:
                if self._closed:
                    break
                works = list(self._works)
                self._notified = False
            turns = [(work, _advance(work)) for work in works]
            over = {id(work) for work, turn in turns if turn is Turn.OVER}
            busiest = max((turn for _, turn in turns), default=Turn.OVER)
            with self._wake:
                self._works = [work for work in self._works if id(work) not in over]
                if busiest is Turn.WORKED:
                    pause_s = _PAUSE_MIN_S
                elif busiest is Turn.WAITING:
                    self._wake.wait(pause_s)
                    pause_s = min(pause_s * 2, _PAUSE_MAX_S)
                elif not self._notified:
                    self._wake.wait(_LOOK_S if self._works else None)
                    pause_s = _PAUSE_MIN_S
        for work in self._works:
            work.fail(TransferError("the worker is shutting down and sends no more KV"))


def _advance(work: Work) -> Turn:
    try:
        return work.advance()
    except Exception as error:  # noqa: BLE001 - the thread's outermost loop: one transfer must not end all others
        _log.exception("a transfer failed in a way nobody foresaw")
        work.fail(error)
        return Turn.OVER
