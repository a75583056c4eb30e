"""Exact match of the reference model through a whole cluster, by visual-token budget.

    python -m benchmarks.demo_accuracy [--per-family N] [--concurrency C] [--out FOLDER]

Starts a cluster of one prefill and one decode worker and asks it questions about held-out scenes: with compression
off, with VisionZip at 98, 49 and 24 of the 196 visual tokens, and with random pruning at the same counts. The same
questions are asked in every setting. Writes ``demo_accuracy.md``, ``.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prismserve.client import AsyncClient
from prismserve.cluster.served import ServedCluster
from prismserve.core.errors import PrismServeError
from prismserve.models.reference.scenes import FAMILIES, make_scene

SEED_FIRST: Final = 10_000_000  # evaluation seeds start here; no scene was trained on
KEEPS: Final = (98, 49, 24)
VISUAL_TOKENS: Final = 196
_ANSWER_TOKENS_MAX: Final = 48
_ASK_TIMEOUT_S: Final = 120.0
_Z_95: Final = 1.959964


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to serve: a name for the table, the request's ``compression``, and the visual tokens it keeps."""

    method: str
    keep: int
    compression: str | Mapping[str, Any]

    @property
    def name(self) -> str:
        """Row of the table."""
        return self.method if self.method == "off" else f"{self.method} {self.keep}"


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one scene."""

    seed: int
    family: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer, judged.

    Attributes:
        family: of the question.
        right: exact match.
        ttft_ms: as the server measured it.
        kv_bytes_sent: between prefill and decode.
        visual_tokens: kept.
    """

    family: str
    right: bool
    ttft_ms: float
    kv_bytes_sent: int
    visual_tokens: int


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers among those asked, with the Wilson interval at 95 %."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Right over asked; NaN when nothing was asked."""
        return self.right / self.asked if self.asked else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson score interval (E. B. Wilson, 1927) at 95 %; (0, 1) when nothing was asked."""
        if not self.asked:
            return 0.0, 1.0
        spread = _Z_95**2 / self.asked
        center = (self.share + spread / 2) / (1 + spread)
        half = _Z_95 / (1 + spread) * math.sqrt(self.share * (1 - self.share) / self.asked + spread / (4 * self.asked))
        # At 0 and 1 the bound is exact; rounding must not put it on the wrong side of the share.
        return max(0.0, min(self.share, center - half)), min(1.0, max(self.share, center + half))

    @property
    def document(self) -> dict[str, Any]:
        """For a JSON document."""
        low, high = self.interval
        return {"right": self.right, "asked": self.asked, "share": self.share, "low": low, "high": high}

    @classmethod
    def total(cls, scores: Iterable[Score]) -> Score:
        """All of them together."""
        pairs = [(score.right, score.asked) for score in scores]
        return cls(sum(right for right, _ in pairs), sum(asked for _, asked in pairs))


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one setting.

    Attributes:
        setting: how it was served.
        families: score by question family.
        total: score over all questions.
        ttft_p50_ms: median time to first token.
        kv_bytes_sent_mean: mean over the answers.
        visual_tokens_mean: mean of the visual tokens kept.
    """

    setting: Setting
    families: Mapping[str, Score]
    total: Score
    ttft_p50_ms: float
    kv_bytes_sent_mean: float
    visual_tokens_mean: float


def settings() -> tuple[Setting, ...]:
    """The settings that are compared, in the order of the table."""
    pruned = (
        Setting(method, keep, {"visual": {"method": method, "keep": keep}})
        for keep in KEEPS
        for method in ("visionzip", "random")
    )
    return Setting("off", VISUAL_TOKENS, "off"), *pruned


def draw_questions(per_family: int, first_seed: int = SEED_FIRST) -> tuple[Question, ...]:
    """The first ``per_family`` questions of each family, at most one of a family from each scene, in order of seed."""
    counts = dict.fromkeys(FAMILIES, 0)
    chosen: list[Question] = []
    seed = first_seed
    while any(count < per_family for count in counts.values()):
        taken: set[str] = set()
        for family, text, answer in make_scene(seed)[1]:
            if family not in taken and counts[family] < per_family:
                taken.add(family)
                counts[family] += 1
                chosen.append(Question(seed, family, text, answer))
        seed += 1
    return tuple(chosen)


def summarise(setting: Setting, scored: Sequence[Scored]) -> Row:
    """Fold the answers of one setting into its row."""
    families = {
        family: Score(
            right=sum(entry.right for entry in scored if entry.family == family),
            asked=sum(entry.family == family for entry in scored),
        )
        for family in FAMILIES
    }
    return Row(
        setting=setting,
        families=families,
        total=Score(right=sum(entry.right for entry in scored), asked=len(scored)),
        ttft_p50_ms=statistics.median(entry.ttft_ms for entry in scored),
        kv_bytes_sent_mean=statistics.fmean(entry.kv_bytes_sent for entry in scored),
        visual_tokens_mean=statistics.fmean(entry.visual_tokens for entry in scored),
    )


def markdown(rows: Sequence[Row], conditions: str) -> str:
    """The results as a Markdown page."""
    header = ["served with", "visual tokens", *FAMILIES, "all", "95 % interval", "TTFT p50", "KV sent"]
    lines = [
        "# Accuracy by visual-token budget",
        "",
        conditions,
        "",
        "Exact match in percent. The interval is Wilson's for all questions together; those of the families are in the",
        "JSON file. KV sent is the mean number of bytes that crossed from the prefill to the decode worker per answer;",
        "answers whose prompt a decode worker had cached sent less. TTFT is the router's, under the load of this run.",
        "",
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
    ]
    for row in rows:
        low, high = row.total.interval
        shares = [f"{100 * row.families[family].share:.1f}" for family in FAMILIES]
        cells = [
            row.setting.name,
            f"{row.visual_tokens_mean:.0f}",
            *shares,
            f"**{100 * row.total.share:.1f}**",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{row.ttft_p50_ms:.0f} ms",
            f"{row.kv_bytes_sent_mean / 1024:.1f} KiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def document(rows: Sequence[Row], conditions: str) -> dict[str, Any]:
    """The results as a JSON document."""
    return {
        "conditions": conditions,
        "rows": [
            {
                "setting": dataclasses.asdict(row.setting),
                "total": row.total.document,
                "families": {family: score.document for family, score in row.families.items()},
                "ttft_p50_ms": row.ttft_p50_ms,
                "kv_bytes_sent_mean": row.kv_bytes_sent_mean,
                "visual_tokens_mean": row.visual_tokens_mean,
            }
            for row in rows
        ],
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy over visual tokens kept, one line per method, bars for the 95 % intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    off = next(row for row in rows if row.setting.method == "off")
    axes.axhline(100 * off.total.share, color="0.5", linestyle="--", label=f"off ({VISUAL_TOKENS} tokens)")
    for method, color in (("visionzip", "#1f77b4"), ("random", "#d62728")):
        mine = sorted((row for row in rows if row.setting.method == method), key=lambda row: row.setting.keep)
        shares = [100 * row.total.share for row in mine]
        bounds = [[100 * bound for bound in row.total.interval] for row in mine]
        errors = [
            [share - low for share, (low, _) in zip(shares, bounds, strict=True)],
            [high - share for share, (_, high) in zip(shares, bounds, strict=True)],
        ]
        keeps = [row.setting.keep for row in mine]
        axes.errorbar(keeps, shares, yerr=errors, color=color, marker="o", capsize=3, label=method)
    axes.set_xscale("log")
    axes.set_xticks(KEEPS, [str(keep) for keep in KEEPS])
    axes.minorticks_off()
    axes.set(xlabel=f"visual tokens kept of {VISUAL_TOKENS}", ylabel="exact match (%)", ylim=(0, 102))
    axes.set_title("Reference model, all question families")
    axes.legend(loc="lower right")
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def encode(seed: int) -> bytes:
    """The scene's picture as a PNG file."""
    stream = io.BytesIO()
    make_scene(seed)[0].save(stream, format="PNG")
    return stream.getvalue()


async def ask_all(
    client: AsyncClient,
    setting: Setting,
    questions: Sequence[tuple[Question, bytes]],
    concurrency: int,
    on_answer: Callable[[], None],
) -> list[Scored]:
    """Ask every question with one setting, ``concurrency`` at a time.

    Args:
        client: connected to the cluster.
        setting: how to serve.
        questions: each with its picture, an encoded image file.
        concurrency: questions in flight.
        on_answer: called after each answer.

    Raises:
        ClientError: of the first question that failed; the others are cancelled.
    """
    rest = iter(questions)
    scored: list[Scored] = []

    async def work() -> None:
        for question, image in rest:
            answer = await client.generate(
                question.text,
                images=[image],
                compression=setting.compression,
                temperature=0.0,
                max_tokens=_ANSWER_TOKENS_MAX,
            )
            right = answer.text.strip() == question.answer
            usage = answer.usage
            scored.append(Scored(question.family, right, usage.ttft_ms, usage.kv_bytes_sent, usage.visual_tokens_after))
            on_answer()

    tasks = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return scored


async def measure(target: str, questions: Sequence[Question], concurrency: int, timeout_s: float) -> list[Row]:
    """Measure every setting against the cluster at ``target``; TimeoutError after ``timeout_s``."""
    columns = (TextColumn("{task.description:>13}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pictures = {question.seed: encode(question.seed) for question in questions}
    pairs = [(question, pictures[question.seed]) for question in questions]
    rows = []
    async with asyncio.timeout(timeout_s), AsyncClient(target, timeout_s=_ASK_TIMEOUT_S) as client:
        with Progress(*columns) as progress:
            for setting in settings():
                task = progress.add_task(setting.name, total=len(questions))
                advance = functools.partial(progress.advance, task)
                scored = await ask_all(client, setting, pairs, concurrency, advance)
                rows.append(summarise(setting, scored))
    return rows


def write(rows: Sequence[Row], conditions: str, folder: Path) -> str:
    """Write the page, the JSON document and the plot into ``folder``; the page."""
    folder.mkdir(parents=True, exist_ok=True)
    page = markdown(rows, conditions)
    (folder / "demo_accuracy.md").write_text(page, encoding="utf-8")
    text = json.dumps(document(rows, conditions), indent=2) + "\n"
    (folder / "demo_accuracy.json").write_text(text, encoding="utf-8")
    plot(rows, folder / "demo_accuracy.png")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.demo_accuracy``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_accuracy", description=__doc__.partition("\n")[0])
    parser.add_argument("--per-family", type=int, default=50, help="questions of each family (default: 50)")
    parser.add_argument("--concurrency", type=int, default=8, help="questions in flight (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="for all questions, in seconds (default: 3600)")
    arguments = parser.parse_args(argv)
    for name in ("per_family", "concurrency"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    questions = draw_questions(arguments.per_family)
    began = time.monotonic()
    replicas = ("--prefill-replicas", "1", "--decode-replicas", "1")
    # Replays would be measured with the questions.
    flags = ("--model", "reference", *replicas, "--fidelity-share", "0")
    try:
        with ServedCluster(flags) as cluster:
            target = cluster.addresses.grpc
            rows = asyncio.run(measure(target, questions, arguments.concurrency, arguments.timeout_s))
    except TimeoutError:
        print(f"failed: the questions took longer than {arguments.timeout_s:.0f} s (--timeout-s)", file=sys.stderr)
        return 1
    except PrismServeError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    conditions = (
        f"{len(questions)} questions in each setting, {arguments.per_family} of each family, about held-out scenes from "
        f"seed {SEED_FIRST}; one prefill and one decode worker, {arguments.concurrency} questions in flight, greedy."
    )
    print(write(rows, conditions, arguments.out))
    print(f"written to {arguments.out} after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
