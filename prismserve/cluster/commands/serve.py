"""``prismserve serve``: start a cluster, print one ready line, stay until told to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from prismserve.cluster.lifecycle import Cluster
from prismserve.cluster.settings import add_serve_arguments, settings_from
from prismserve.core.errors import PrismServeError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from types import FrameType

    from prismserve.cluster.startup import Stage

WATCH_INTERVAL_S = 1.0
EXIT_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``serve``: every setting."""
    add_serve_arguments(parser)


class StartupDisplay:
    """Progress bars on standard error: one per process that is starting. Plain lines where it is no terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[stage]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def show(self, stages: Mapping[str, Stage]) -> None:
        """Draw the latest stages."""
        for who, stage in sorted(stages.items()):
            if self._console.is_terminal:
                if who not in self._tasks:
                    self._tasks[who] = self._progress.add_task(who, total=None, stage="")
                self._progress.update(
                    self._tasks[who],
                    total=1 if stage.stage == "ready" else (stage.total or None),
                    completed=1 if stage.stage == "ready" else stage.done,
                    stage=stage.stage,
                )
            elif self._stages.get(who) != stage.stage:
                self._console.print(f"{who}: {stage.stage}", highlight=False)
            self._stages[who] = stage.stage


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Exit status 0 after an orderly stop, 1 with one sentence if it cannot serve."""
    stop = threading.Event()

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            return
        stop.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    cluster: Cluster | None = None
    status = 0
    try:
        settings = settings_from(args, os.environ)
        with StartupDisplay() as display:
            cluster = Cluster(settings, display.show)
            addresses = cluster.start()
        signal.signal(signal.SIGTERM, interrupt)  # Ray installs a handler of its own while it starts
        print(f"ready http=http://{addresses.http} grpc={addresses.grpc}", flush=True)
        while not stop.wait(WATCH_INTERVAL_S):
            cluster.watch()
    except KeyboardInterrupt:
        stop.set()
        # `python -m` ends by SIGINT if an interrupt ever passed through exec(), as of a dataclass in an import, though it was
        # caught since. The next exec() makes Python forget it.
        exec("")  # noqa: S102
    except PrismServeError as error:
        print(f"prismserve: {error.message}", file=sys.stderr, flush=True)
        status = EXIT_FAILED
    finally:
        stop.set()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if cluster is not None:
            cluster.stop()
    return status
