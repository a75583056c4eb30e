"""The server half of the line protocol: one JSON object per line in, one out.

The first line out is ``{"ready": {...}}`` with what the system says of itself. Each line in is
``{"jobs": [{"ids": [...], "image": path or null, "tokens": n, "keep": k or null}, ...]}``: prompts to be answered
greedily and all at once, ``n`` tokens each, whatever the model thinks of stopping. ``ids`` holds one image token where
the image stands. The answer is ``{"answers": [{"ids": [...], "at_s": [...]}, ...]}``, with the time of each token
since the line was read, or ``{"error": "..."}``.

Standard output is kept for the protocol: whatever else a library prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """One prompt to be answered.

    Attributes:
        ids: token ids, one image token where the image stands.
        image: path of the image file, None without an image.
        tokens: how many to generate.
        keep: visual tokens to keep, None for all.
    """

    ids: list[int]
    image: str | None
    tokens: int
    keep: int | None


@dataclass
class Answer:
    """Generated token ids, and when each came, in seconds since the line was read."""

    ids: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)


class Clock:
    """Seconds since a line was read."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self) -> float:
        """Seconds gone."""
        return time.perf_counter() - self._started


Run = Callable[[Sequence[Job], Clock], tuple[list[Answer], dict[str, Any]]]
"""Answers jobs; returns the answers in order and whatever else the system wants to report of this run."""


def serve(start: Callable[[], tuple[Run, dict[str, Any]]]) -> None:
    """Start a system and answer lines until standard input ends.

    Args:
        start: loads and warms the system; returns what runs jobs and what the system says of itself.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        run, about = start()
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise
    say({"ready": about})
    for line in sys.stdin:
        clock = Clock()
        try:
            answers, more = run([Job(**job) for job in json.loads(line)["jobs"]], clock)
        except Exception as error:  # noqa: BLE001 - reported to the other side, which ends the run
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {error}"})
            continue
        say({"answers": [vars(answer) for answer in answers], "wall_s": clock(), **more})
