"""How many processor cores this process may use, by its affinity and its control groups; no more are there for it.

``os.cpu_count()`` counts the machine's, of which a container or a pinned process has a part.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_GROUPS: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")


def visible_cores() -> int:
    """Whole cores, at least 1: those the process may be scheduled on, or the quota of its groups if that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(allowed, quota_cores(_MEMBERSHIP, _GROUPS))))


def share_of(cores: int, workers: int) -> int:
    """Cores of one of ``workers`` on a machine, at least 1: together they take no more than there are, if they can."""
    return max(1, cores // workers)


def quota_cores(membership: Path, groups: Path) -> float:
    """The least quota among the control groups of a process and those around them, in cores; infinite without one.

    Args:
        membership: ``/proc/<pid>/cgroup``.
        groups: where the hierarchies are mounted.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # no control groups here
        return math.inf
    return min((quota for line in lines for quota in _quotas(line, groups)), default=math.inf)


def _quotas(line: str, groups: Path) -> Iterator[float]:
    """Quotas along one line ``hierarchy:controllers:path``; version 2 has no controllers there."""
    _, controllers, path = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return
    mount = groups / controllers if controllers else groups
    folder = mount / path.lstrip("/")
    for group in (folder, *folder.parents):
        yield _quota(group, unified=not controllers)
        if group == mount:
            return


def _quota(group: Path, *, unified: bool) -> float:
    names = ("cpu.max",) if unified else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        fields = [field for name in names for field in (group / name).read_text(encoding="ascii").split()]
    except OSError:  # the root of a hierarchy has no quota, and a group outside the namespace is not seen
        return math.inf
    quota, period = fields
    # Without a quota: ``max`` in version 2, -1 in version 1.
    return math.inf if quota in {"max", "-1"} else int(quota) / int(period)
