"""Under what conditions something was measured: when, on what, and what else the machine did meanwhile."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICK_S: Final = 1.0 / os.sysconf("SC_CLK_TCK")
_BUSY_FIELDS: Final = (0, 1, 2, 5, 6)
"""user, nice, system, irq and softirq of the first line of ``/proc/stat``."""


@dataclass
class Conditions:
    """Of one measurement; complete once it is over.

    Attributes:
        date: UTC, when it began, to the minute.
        device: the processor and how many of them this process may use.
        load_before: load average over one minute when it began.
        load_after: the same when it ended; what was measured is part of it.
        others_share: of all processor time meanwhile, what neither this process nor its children took; 0 to 1.
    """

    date: str
    device: str
    load_before: float
    load_after: float = 0.0
    others_share: float = 0.0

    def sentence(self) -> str:
        """All of it for a page."""
        return (
            f"{self.date} UTC on {self.device}. Load average {self.load_before:.1f} before and {self.load_after:.1f} "
            f"after; other processes took {100 * self.others_share:.0f} % of the processors' time meanwhile."
        )


@contextlib.contextmanager
def observed() -> Iterator[Conditions]:
    """The conditions of what runs in the block; children must have ended and been waited for before its end."""
    date = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M")
    conditions = Conditions(date, _device(), os.getloadavg()[0])
    busy_s, total_s = _machine_s()
    own_s = _own_s()
    yield conditions
    busy_after_s, total_after_s = _machine_s()
    conditions.load_after = os.getloadavg()[0]
    spent_s = max(_TICK_S, total_after_s - total_s)
    conditions.others_share = max(0.0, (busy_after_s - busy_s) - (_own_s() - own_s)) / spent_s


def _device() -> str:
    return f"{_processor()}, {len(os.sched_getaffinity(0))} processors"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _machine_s() -> tuple[float, float]:
    """Busy and all seconds of all processors since the machine started."""
    first = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0]
    fields = [int(field) * _TICK_S for field in first.split()[1:9]]
    return sum(fields[place] for place in _BUSY_FIELDS), sum(fields)


def _own_s() -> float:
    """Seconds of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
