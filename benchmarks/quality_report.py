"""The table, the JSON document and the plot of :mod:`benchmarks.quality`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.demo_accuracy import VISUAL_TOKENS, Score
from benchmarks.tables import markdown_table
from prismserve.models.reference.scenes import FAMILIES

INSIDE: Final = "prefill/"
"""Begins the names of methods that act inside the decoder."""
_SAME_MS: Final = 0.05


@dataclass(slots=True)
class Row:
    """The results of one method at one budget.

    Attributes:
        method: name, ``off``, or ``prefill/<name>``.
        keep: visual tokens asked for.
        share: the method's share code.
        families: score by question family.
        cost_ms: median time of choosing and merging for one picture, in milliseconds, with the encoder's keys and
            attention where the method needs them; 0 for methods inside the decoder.
        ttft_ms: median time to the first token of a picture not seen before, alone in the engine.
        kv_bytes: of the prompt, mean over the questions.
        encode_ms: what the encoder takes for one picture without a method, in the same run.
    """

    method: str
    keep: int
    share: str
    families: dict[str, Score] = field(default_factory=dict)
    cost_ms: float = 0.0
    ttft_ms: float = 0.0
    kv_bytes: float = 0.0
    encode_ms: float = math.nan

    @property
    def total(self) -> Score:
        """All questions together."""
        return Score.total(self.families.values())


def markdown(rows: Sequence[Row], conditions: str) -> str:
    """The results as a page."""
    header = ["kept", "method", "share", *FAMILIES, "all", "95 %", "ms", "of encoder", "TTFT ms", "KV KiB"]
    body = []
    for row in rows:
        low, high = row.total.interval
        body.append(
            [
                str(row.keep),
                row.method,
                row.share,
                *(f"{100 * row.families[name].share:.1f}" for name in FAMILIES),
                f"**{100 * row.total.share:.1f}**",
                f"{100 * low:.1f} to {100 * high:.1f}",
                f"{row.cost_ms:.2f}",
                f"{100 * row.cost_ms / row.encode_ms:.0f} %",
                "" if math.isnan(row.ttft_ms) else f"{row.ttft_ms:.1f}",
                f"{row.kv_bytes / 1024:.0f}",
            ]
        )
    least, most = (choose(row.encode_ms for row in rows) for choose in (min, max))
    encoder = f"{least:.1f}" if most - least < _SAME_MS else f"{least:.1f} to {most:.1f}"
    lines = [
        "# Quality and cost by method and budget",
        "",
        conditions,
        "",
        "Exact match in percent, by family of questions; the interval is Wilson's for all questions together. *ms* is what",
        f"a method adds for one picture, *of encoder* that as a share of the {encoder} ms the encoder takes without it in the",
        "same run; projecting every token into the decoder's space once is not counted, since it is done without any method too.",
        "Budgets are tokens of 196; of a method inside the decoder (`prefill/`), what is left after its last cut. TTFT is the",
        "engine's own, one picture at a time, nothing cached. All times are CPU time of the one thread.",
        "",
        markdown_table(header, body, left=3),
    ]
    return "\n".join(lines) + "\n"


def document(rows: Sequence[Row], conditions: str) -> dict[str, Any]:
    """The results as a JSON document."""
    return {
        "conditions": conditions,
        "rows": [
            {
                "method": row.method,
                "keep": row.keep,
                "share": row.share,
                "total": row.total.document,
                "families": {name: score.document for name, score in row.families.items()},
                "cost_ms": row.cost_ms,
                "ttft_ms": None if math.isnan(row.ttft_ms) else row.ttft_ms,
                "kv_bytes": row.kv_bytes,
                "encode_ms": row.encode_ms,
            }
            for row in rows
        ],
    }


def rows_of(document: dict[str, Any]) -> list[Row]:
    """The rows of a JSON document that :func:`document` made; KeyError or TypeError if it is none."""
    rows = []
    for row in document["rows"]:
        families = {name: Score(score["right"], score["asked"]) for name, score in row["families"].items()}
        ttft_ms = math.nan if row["ttft_ms"] is None else row["ttft_ms"]
        encode_ms = row.get("encode_ms", document.get("encode_ms"))
        one = Row(
            row["method"], row["keep"], row["share"], families, row["cost_ms"], ttft_ms, row["kv_bytes"], encode_ms
        )
        rows.append(one)
    return rows


def updated(before: Sequence[Row], measured: Sequence[Row]) -> list[Row]:
    """Rows with those measured anew in the places of the old ones; new ones stand behind the others of their budget."""
    fresh = {(row.keep, row.method): row for row in measured}
    rows: list[Row] = []
    for keep in dict.fromkeys(row.keep for row in (*before, *measured)):
        mine = [fresh.pop((keep, row.method), row) for row in before if row.keep == keep]
        rows += [*mine, *(row for row in measured if row.keep == keep and (keep, row.method) in fresh)]
    return rows


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy over visual tokens kept, one line per method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    colors = plt.get_cmap("tab20")
    for number, (method, mine) in enumerate(by_method.items()):
        if method == "off":
            axes.axhline(100 * mine[0].total.share, color="0.5", linestyle="--", label="off")
            continue
        style = ":" if method.startswith(INSIDE) else "-"
        points = [(row.keep, 100 * row.total.share) for row in sorted(mine, key=lambda row: row.keep)]
        axes.plot(*zip(*points, strict=True), style, marker=".", color=colors(number % 20), label=method)
    keeps = sorted({row.keep for row in rows if row.method != "off"})
    axes.set_xscale("log")
    axes.set_xticks(keeps, [str(keep) for keep in keeps])
    axes.minorticks_off()
    axes.set(xlabel=f"visual tokens kept of {VISUAL_TOKENS}", ylabel="exact match (%)", ylim=(0, 102))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(rows: Sequence[Row], conditions: str, folder: Path) -> str:
    """Write the page, the JSON document and the plot into ``folder``; the page."""
    folder.mkdir(parents=True, exist_ok=True)
    page = markdown(rows, conditions)
    (folder / "quality.md").write_text(page, encoding="utf-8")
    (folder / "quality.json").write_text(json.dumps(document(rows, conditions), indent=1) + "\n", "utf-8")
    plot(rows, folder / "quality.png")
    return page


def one_line(row: Row) -> str:
    """A row while the benchmark runs."""
    shares = " ".join(f"{name[:4]} {100 * score.share:5.1f}" for name, score in row.families.items())
    return f"{100 * row.total.share:5.1f} | {shares} | {row.cost_ms:.2f} ms, TTFT {row.ttft_ms:.1f} ms"
