"""Whole requests through a small cluster: what transfers cost them, and bytes beside accuracy; the page and its file.

Each part keeps its own conditions, and a part that is not measured now stands on the page as it was measured last.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.engine.checkpoints import LLAVA, LLAVA_TINY
from benchmarks.tables import markdown_table
from benchmarks.transfer import accuracy, exposure
from benchmarks.transfer.conditions import observed

PARTS: Final = ("exposed", "accuracy")
NAME: Final = "transfer_end_to_end"
ROUNDS: Final = 7
PER_FAMILY: Final = 100
START_TIMEOUT_S: Final = 600.0
LIMIT_S: Final = 7200.0
_BUSY_SHARE: Final = 0.25
_STRETCHED: Final = (
    "All times are stretched by that, exposed ones included; on a quiet machine they must be measured again."
)


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    Attributes:
        parts: of :data:`PARTS`.
        rounds: pictures for each plan of the exposed transfer.
        per_family: questions of each family.
        quick: a tiny checkpoint and few settings, to see whether it all works.
        start_timeout_s: how long a worker may take to be ready.
        limit_s: how long after its workers are ready a part begins no new round or scene.
        cache: folder of checkpoints.
    """

    parts: Sequence[str] = PARTS
    rounds: int = ROUNDS
    per_family: int = PER_FAMILY
    quick: bool = False
    start_timeout_s: float = START_TIMEOUT_S
    limit_s: float = LIMIT_S
    cache: Path = Path()


def run(options: Options, folder: Path) -> str:
    """Measure what is asked for and write page and file after each part; the page."""
    path = folder / f"{NAME}.json"
    text = ""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if part not in options.parts:
            continue
        with observed() as conditions:
            found = _exposed(options) if part == "exposed" else _accuracy(options)
        found |= {"conditions": dataclasses.asdict(conditions), "measured": conditions.sentence()}
        # Read as late as this, so that parts may be measured side by side.
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        document[part] = found
        text = page(document)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
    return text


def _exposed(options: Options) -> dict[str, Any]:
    shape = LLAVA_TINY if options.quick else LLAVA
    say = _Progress("exposed transfer")
    rows = asyncio.run(
        exposure.measure(shape, options.cache, options.rounds, options.start_timeout_s, options.limit_s, say)
    )
    return {"model": "tiny" if options.quick else "0.45 B", "rows": exposure.document(rows)}


def _accuracy(options: Options) -> dict[str, Any]:
    settings = accuracy.SETTINGS[:4] if options.quick else accuracy.SETTINGS
    say = _Progress("accuracy")
    rows = asyncio.run(accuracy.measure(options.per_family, settings, options.start_timeout_s, options.limit_s, say))
    return {"rows": accuracy.document(rows)}


class _Progress:
    """Says on standard error what is being done, with the seconds since the start."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began_s = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self._began_s:6.0f} s  {self._what}: {text}", file=sys.stderr, flush=True)


# ---- the page -----------------------------------------------------------------------------------------------------


def page(document: dict[str, Any]) -> str:
    """What has been measured so far, as Markdown."""
    lines = [
        "# KV transfer in whole requests",
        "",
        "One prefill and one decode worker in processes of their own, one thread each, KV in float32; the router is in",
        "the process that asks. Written by `python -m benchmarks.transfer --end-to-end`.",
    ]
    if "exposed" in document:
        lines += _exposed_section(document["exposed"])
    if "accuracy" in document:
        lines += _accuracy_section(document["accuracy"])
    return "\n".join(lines) + "\n"


def _exposed_section(part: dict[str, Any]) -> list[str]:
    rows = part["rows"]
    return [
        "",
        "## Exposed transfer",
        "",
        f"A LLaVA-1.5-shaped model of random weights ({part['model']}), {rows[0]['pictures']} pictures for each plan that no worker had seen,",
        "one at a time, the plans in turns; medians. Exposed is the time from the end of the prefill until the decode",
        "worker has verified all KV and decodes. Whatever is neither encoding nor prefill bounds it from above: that holds",
        "the calls between router and workers, and the preparation of the picture, too.",
        "",
        part["measured"],
        *([_STRETCHED] if part["conditions"]["others_share"] > _BUSY_SHARE else []),
        "",
        exposure_table(rows),
        "",
        *(
            f"- {row['visual_tokens']} visual tokens, codec {row['codec']}: target at most {100 * row['target']:.0f} %, "
            f"measured {100 * row['share']:.2f} %: {'met' if row['met'] else 'missed'}."
            for row in rows
            if row["target"] is not None
        ),
    ]


def exposure_table(rows: Sequence[dict[str, Any]]) -> str:
    """What waiting for KV adds to the time to first token."""
    header = [
        "visual tokens",
        "codec",
        "TTFT (ms)",
        "encoding (ms)",
        "prefill (ms)",
        "exposed (ms)",
        "of TTFT",
        "largest",
        "upper bound",
        "KV sent (KiB)",
        "transport",
    ]
    cells = [
        [
            str(row["visual_tokens"]),
            row["codec"],
            f"{row['ttft_ms']:.0f}",
            f"{row['encode_ms']:.0f}",
            f"{row['prefill_ms']:.0f}",
            f"{row['exposed_ms']:.2f}",
            f"{100 * row['share']:.2f} %",
            f"{100 * row['share_max']:.2f} %",
            f"{100 * row['bound']:.2f} %",
            f"{row['kv_bytes_sent'] / 1024:.0f}",
            row["transport"],
        ]
        for row in rows
    ]
    return markdown_table(header, cells, left=2)


def _accuracy_section(part: dict[str, Any]) -> list[str]:
    rows = part["rows"]
    fit = [row for row in rows if row["met"]]
    asked = rows[0]["score"]["asked"]
    best = min(fit, key=lambda row: row["share"], default=None)
    verdict = (
        "no setting meets both."
        if best is None
        else f"{len(fit)} settings meet both; the fewest bytes: {_name(best['setting'])} with {100 * best['share']:.1f} % "
        f"at {best['lost']:.1f} points lost."
    )
    return [
        "",
        "## Bytes for a picture beside accuracy",
        "",
        f"The bundled model, {asked} held-out questions in each setting, exact match, greedy. Bytes are those sent for a",
        "picture that the decode worker had never seen, with the first question about it, over the uncompressed KV of all",
        "visual tokens alone, in the float32 in which it is computed and beside KV of 16 bits. Points lost are over the",
        "same questions, with their interval at 95 %. Random prunes to the same count under the same codec.",
        "",
        part["measured"],
        "",
        accuracy_table(rows),
        "",
        f"Target: at most {100 * accuracy.SHARE_MAX:.0f} % of the bytes at {accuracy.POINTS_LOST_MAX:.0f} point lost or less: {verdict}",
    ]


def accuracy_table(rows: Sequence[dict[str, Any]]) -> str:
    """Bytes beside accuracy, and beside the control."""
    header = [
        "setting",
        "visual tokens",
        "KV sent (KiB)",
        "of float32 KV",
        "of 16-bit KV",
        "exact match",
        "points lost",
        "95 % interval",
        "random, same budget",
        "target",
    ]
    cells = [
        [
            _name(row["setting"]),
            f"{row['visual_tokens']:.0f}",
            f"{row['kv_bytes'] / 1024:.1f}",
            f"{100 * row['share']:.1f} %",
            f"{100 * row['share_16_bits']:.1f} %",
            _percent(row["score"]),
            f"{row['lost']:.1f}",
            f"{row['lost_interval'][0]:.1f} to {row['lost_interval'][1]:.1f}",
            _percent(row["control"]) if row["control"] else "",
            "met" if row["met"] else "",
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


def _name(setting: dict[str, Any]) -> str:
    visual = "all tokens" if setting["visual"] == accuracy.OFF else f"{setting['visual']} {100 * setting['keep']:.0f} %"
    return f"{visual}, {setting['codec']}"


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['right'] / score['asked']:.1f} %"
