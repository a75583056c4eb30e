"""The tables of ``docs/faults.md``: what is injected, what must hold, and the tests that show it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
FAULTS, HOSTILE = "Faults", "Hostile inputs"


@dataclass(frozen=True)
class Row:
    """One line; ``tests`` are ids without parameters."""

    section: str
    inject: str
    holds: str
    tests: tuple[str, ...]


def rows(section: str | None = None) -> list[Row]:
    found = []
    heading = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        tests = tuple(re.findall(r"`(tests/[a-z_/0-9]+\.py::[a-z_0-9]+)`", line))
        if line.startswith("|") and len(cells) == 3 and not cells[0].startswith("-") and cells[2] != "tests":
            found.append(Row(heading, cells[0], cells[1], tests))
    return [row for row in found if section in (None, row.section)]
