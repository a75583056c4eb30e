"""The page and the JSON document of :mod:`benchmarks.video_quality`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.demo_accuracy import Score
from benchmarks.tables import markdown_table

RANDOM: Final = "random"


@dataclass(frozen=True, slots=True)
class Basis:
    """What rows must share to stand in one table.

    Attributes:
        per_family: questions of each family.
        seed: the first clip.
        least: share right a family needs without compression.
        weights: SHA-256 of the decoder's file.
    """

    per_family: int
    seed: int
    least: float
    weights: str


@dataclass(frozen=True, slots=True)
class Family:
    """A family of questions before any compression.

    Attributes:
        score: of the model.
        guess: share right of whoever always gives the most common answer.
        used: whether methods are measured on it.
    """

    name: str
    score: Score
    guess: float
    used: bool


@dataclass(frozen=True, slots=True)
class VideoRow:
    """The results of one method at one budget.

    Attributes:
        keep: visual tokens asked for.
        share: the method's share code.
        families: score by question family.
        tokens: visual tokens of the frames that were left, mean over the questions.
        cost_ms: median time of choosing and merging for one clip; 0 for methods inside the decoder.
    """

    method: str
    keep: int
    share: str
    families: Mapping[str, Score]
    tokens: float
    cost_ms: float

    @property
    def total(self) -> Score:
        """All questions together."""
        return Score.total(self.families.values())

    def only(self, names: Sequence[str]) -> VideoRow:
        """The same row for some families."""
        return dataclasses.replace(self, families={name: self.families[name] for name in names})


def _cell(score: Score) -> str:
    low, high = score.interval
    return f"{100 * score.share:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _against_random(row: VideoRow, control: VideoRow | None) -> str:
    """Points above the random row of the same budget; marked where the intervals of the two do not meet."""
    if control is None or row.method in {"off", RANDOM}:
        return ""
    apart = row.total.interval[0] > control.total.interval[1] or row.total.interval[1] < control.total.interval[0]
    return f"{100 * (row.total.share - control.total.share):+.1f}{' *' if apart else ''}"


def _families(families: Sequence[Family]) -> str:
    body = [
        [one.name, _cell(one.score), f"{100 * one.guess:.1f}", "yes" if one.used else "no"]
        for one in sorted(families, key=lambda one: not one.used)
    ]
    return markdown_table(["family", "off", "most common answer", "in the table"], body)


def markdown(rows: Sequence[VideoRow], families: Sequence[Family], conditions: str) -> str:
    """The results as a page."""
    used = [family.name for family in families if family.used]
    controls = {row.keep: row for row in rows if row.method == RANDOM}
    body = [
        [
            str(row.keep),
            row.method,
            row.share,
            f"{row.tokens:.0f}",
            *(_cell(row.families[name]) for name in used),
            f"**{100 * row.total.share:.1f}** ({100 * row.total.interval[0]:.1f} to {100 * row.total.interval[1]:.1f})",
            _against_random(row, controls.get(row.keep)),
            f"{row.cost_ms:.2f}",
        ]
        for row in rows
    ]
    lines = [
        "# Quality of video compression by method and budget",
        "",
        conditions,
        "",
        "Exact match in percent, with Wilson's interval at 95 % in brackets. *off* is the model without compression,",
        "*most common answer* what the same answer to every question of a family would reach. A family the model does not",
        "answer without compression says nothing about methods and is left out.",
        "",
        _families(families),
        "",
        "*kept* is asked for, of 196 tokens; *left* what the method left in front of the decoder, mean over the questions; of methods",
        "inside the decoder (`prefill/`) behind their last cut, so their first layers see more: `framefusion` meets its budget as a",
        "mean over the layers, the thresholds of `sttm` are sought on other clips so that at most about the budget stays. *-random*",
        "is the distance to `random` at the same budget in points, with a star where the intervals do not meet. *ms* is",
        "the method's own time for one clip, median, CPU time of one thread.",
        "",
        markdown_table(["kept", "method", "share", "left", *used, "all", "-random", "ms"], body, left=3),
    ]
    return "\n".join(lines) + "\n"


def document(rows: Sequence[VideoRow], families: Sequence[Family], conditions: str, basis: Basis) -> dict[str, Any]:
    """The results as a JSON document."""
    return {
        "conditions": conditions,
        "basis": dataclasses.asdict(basis),
        "families": {
            one.name: {"off": one.score.document, "most_common_answer": one.guess, "used": one.used} for one in families
        },
        "rows": [
            {
                "method": row.method,
                "keep": row.keep,
                "share": row.share,
                "tokens": row.tokens,
                "total": row.total.document if row.families else None,
                "families": {name: score.document for name, score in row.families.items()},
                "cost_ms": row.cost_ms,
            }
            for row in rows
        ],
    }


def rows_of(document: Mapping[str, Any]) -> list[VideoRow]:
    """The rows of a JSON document that :func:`document` made."""
    return [
        VideoRow(
            row["method"],
            row["keep"],
            row["share"],
            {name: Score(score["right"], score["asked"]) for name, score in row["families"].items()},
            row["tokens"],
            row["cost_ms"],
        )
        for row in document["rows"]
    ]


def families_of(document: Mapping[str, Any]) -> list[Family]:
    """The families of a JSON document that :func:`document` made."""
    return [
        Family(name, Score(one["off"]["right"], one["off"]["asked"]), one["most_common_answer"], used=one["used"])
        for name, one in document["families"].items()
    ]


def write(rows: Sequence[VideoRow], families: Sequence[Family], conditions: str, basis: Basis, folder: Path) -> None:
    """Write the page and the JSON document into ``folder``, large budgets first."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: -row.keep)
    (folder / "video_quality.md").write_text(markdown(rows, families, conditions), encoding="utf-8")
    text = json.dumps(document(rows, families, conditions, basis), indent=1) + "\n"
    (folder / "video_quality.json").write_text(text, encoding="utf-8")


def one_line(row: VideoRow) -> str:
    """A row while the benchmark runs."""
    shares = " ".join(f"{name} {100 * score.share:.1f}" for name, score in row.families.items())
    return f"{100 * row.total.share:5.1f} | {shares} | {row.tokens:.0f} tokens, {row.cost_ms:.2f} ms"
