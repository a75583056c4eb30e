"""Start-up as the command line sees it: every process reports its stage to one small actor."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import ray


@dataclass(frozen=True, slots=True)
class Stage:
    """How far one process is.

    Attributes:
        stage: what it does now: ``starting``, ``weights``, ``ready`` or ``failed``.
        done: units of the stage that are done (bytes for ``weights``).
        total: units in all; 0 if unknown.
        error: one sentence when ``failed``.
        addresses: HTTP and gRPC addresses, ``host:port`` each, of a router that is ``ready``.
    """

    stage: str
    done: int = 0
    total: int = 0
    error: str = ""
    addresses: tuple[str, ...] = ()


@ray.remote(num_cpus=0, max_restarts=0)
class StartupBoard:
    """Holds the latest stage of every process that is starting."""

    def __init__(self) -> None:
        self._stages: dict[str, Stage] = {}

    def report(self, who: str, stage: Stage) -> None:
        """Replace what is known of ``who``."""
        self._stages[who] = stage

    def read(self) -> dict[str, Stage]:
        """Everything known."""
        return dict(self._stages)


class Reporter:
    """Sends one process's stages to the board; never waits, and does without a board that is gone.

    Args:
        board: handle of a :class:`StartupBoard`, or None.
        who: name of the process on the board.
    """

    def __init__(self, board: Any, who: str) -> None:
        self._board = board
        self._who = who

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Report progress."""
        self._send(Stage(stage, done, total))

    def ready(self, *addresses: str) -> None:
        """Report that the process serves, a router with its addresses."""
        self._send(Stage("ready", addresses=addresses))

    def failed(self, error: str) -> None:
        """Report the end of all hope."""
        self._send(Stage("failed", error=error))

    def _send(self, stage: Stage) -> None:
        if self._board is not None:
            self._board.report.remote(self._who, stage)


def configure_logging(level: str) -> None:
    """Log what prismserve says from ``level`` on, and what libraries say from WARNING on, to standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("prismserve").setLevel(level.upper())
