"""The results as a page, a JSON document and a plot."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.load.measure import Measured, Plan, Series
from benchmarks.load.work import OFF, SHARES, Variant
from benchmarks.tables import markdown_table

TTFT_SHARE: Final = min(SHARES)
TTFT_FASTER: Final = 2.0
CORES_SHARE: Final = 0.85
"""Share of the cores it may use that an undisturbed engine gets; below it, times by the clock tell of other work."""
_MIB: Final = 1 << 20


def verdicts(measured: Measured, plan: Plan) -> list[dict[str, Any]]:
    """Every target, what was measured, and whether it is met.

    Of the time to first token: at the smallest budget a method that reduces tokens before the decoder is at least twice
    as fast as no compression. Of the throughput: along falling budgets of a method it never falls.
    """
    found: list[dict[str, Any]] = []
    for variant in plan.alone:
        if variant.stage == "visual" and variant.share == TTFT_SHARE:
            faster = statistics.median(_faster(measured, variant))
            target = f"TTFT at least {TTFT_FASTER:g} times faster than off"
            found.append({"what": variant.name, "target": target, "value": faster, "met": faster >= TTFT_FASTER})
    for method in dict.fromkeys(variant.label for variant in plan.loaded if variant.stage):
        rates = [measured.requests_per_s.median(variant) for variant in _falling(plan.loaded, method)]
        least = min(after / before for before, after in itertools.pairwise(rates))
        target = "throughput rises with every smaller budget (the least step)"
        found.append({"what": method, "target": target, "value": least, "met": least >= 1.0})
    return found


def disturbed(measured: Measured, plan: Plan) -> bool:
    """Whether other work kept the engine from its cores; False where other processes answer, whose time is not known.

    The load average would count the engine itself.
    """
    shares = [
        cpu_s / wall_s / plan.threads
        for cpu_s, wall_s in zip(measured.ttft_cpu_s.values[OFF], measured.ttft_s.values[OFF], strict=False)
    ]
    return bool(shares) and 0.0 < statistics.median(shares) < CORES_SHARE


def page(measured: Measured, plan: Plan, where: Mapping[str, str], about: str) -> str:
    """The Markdown page."""
    loads = ", ".join(f"{load:.1f}" for load in measured.load_average)
    intro = (
        f"{where['date']}, {where['cpu']}, {where['cores']} cores, Python {where['python']}; load average of the machine at "
        f"the beginning of each round {loads}. {where['model']}: {about}. Nothing is cached: each run "
        "begins with empty caches, each round has pictures, sizes and questions of its own, the same for every row, and "
        "the rows take turns. Figures are medians over the rounds with the least and the most of them; a ratio is taken "
        "within a round first. *Processor time* is that of all threads of the engine, which other work on the machine hardly "
        "changes. Random weights are for speed alone and say nothing about quality."
    )
    if disturbed(measured, plan):
        intro += " **Other work kept the machine busy: of these figures, read the processor time.**"
    rows = [
        [item["what"], item["target"], f"{item['value']:.2f}", "met" if item["met"] else "missed"]
        for item in verdicts(measured, plan)
    ]
    alone = (
        f"One request at a time, {_rounds(measured.ttft_s)}; the time runs from the call, so reading the picture and "
        "tokenizing count. *Visual tokens* are those of the last layer, *KV* is that of the prompt."
    )
    loaded = (
        f"{plan.batch} requests at once, {plan.tokens} tokens each, {_rounds(measured.requests_per_s)}; *waited* is the median time "
        "to first token among them, *peak* the most KV blocks in use."
    )
    parts = ["# What compression buys end to end", intro, "## Targets"]
    parts += [markdown_table(("what", "target", "measured", "outcome"), rows, left=2)]
    parts += ["## Time to first token", alone, _alone_table(measured, plan)]
    parts += ["## Throughput", loaded, _loaded_table(measured, plan)]
    return "\n\n".join(parts) + "\n"


def _alone_table(measured: Measured, plan: Plan) -> str:
    base = measured.alone[OFF].answers[0].kv_bytes
    rows = []
    for variant in plan.alone:
        answer = measured.alone[variant].answers[0]
        rows.append(
            [
                variant.label,
                _share(variant),
                str(answer.visual_after),
                _spread(measured.ttft_s, variant, 2),
                _ratio(_faster(measured, variant)),
                *_processors(measured.ttft_cpu_s, variant),
                f"{answer.encode_ms:.0f}",
                f"{answer.kv_bytes / _MIB:.2f}",
                f"{100 * answer.kv_bytes / base:.0f} %",
            ]
        )
    header = (
        *("method", "kept", "visual tokens", "TTFT, s", "faster than off", "processor time, s", "less than off"),
        *("encoder, ms", "KV, MiB", "of off"),
    )
    return markdown_table(header, rows)


def _loaded_table(measured: Measured, plan: Plan) -> str:
    rows = []
    sent = any(answer.kv_sent_bytes for ran in measured.loaded.values() for answer in ran.answers)
    for variant in plan.loaded:
        ran = measured.loaded[variant]
        row = [
            variant.label,
            _share(variant),
            _spread(measured.requests_per_s, variant, 3),
            f"{measured.tokens_per_s.median(variant):.2f}",
            _ratio(measured.requests_per_s.over_off(variant)),
            *_processors(measured.loaded_cpu_s, variant),
            f"{measured.waited_s.median(variant):.1f}",
            f"{statistics.mean(answer.kv_bytes for answer in ran.answers) / _MIB:.2f}",
            f"{ran.peak_blocks}" if ran.peak_blocks else "",
        ]
        if sent:
            row.append(f"{statistics.mean(answer.kv_sent_bytes for answer in ran.answers) / _MIB:.2f}")
        rows.append(row)
    header = [
        *("method", "kept", "requests/s", "tokens/s", "times off", "processor time, s", "less than off"),
        *("waited, s", "KV a request, MiB", "peak blocks"),
    ]
    return markdown_table([*header, *(["KV sent, MiB"] if sent else [])], rows)


def document(measured: Measured, plan: Plan, where: Mapping[str, str], about: str) -> dict[str, Any]:
    """The JSON document: every value of every round, the last run of each row, and the verdicts."""
    figures = {
        name: {variant.name: values for variant, values in series.values.items()}
        for name, series in (
            ("ttft_s", measured.ttft_s),
            ("ttft_cpu_s", measured.ttft_cpu_s),
            ("requests_per_s", measured.requests_per_s),
            ("tokens_per_s", measured.tokens_per_s),
            ("loaded_cpu_s", measured.loaded_cpu_s),
            ("waited_s", measured.waited_s),
        )
    }
    last = {
        part: {variant.name: asdict(ran) for variant, ran in runs.items()}
        for part, runs in (("alone", measured.alone), ("loaded", measured.loaded))
    }
    return {
        "where": dict(where),
        "system": about,
        "load_average": measured.load_average,
        "plan": {"batch": plan.batch, "tokens": plan.tokens},
        "targets": verdicts(measured, plan),
        "rounds": figures,
        "last": last,
    }


def plot(measured: Measured, plan: Plan, path: Path) -> None:
    """Draw time to first token and throughput over the share of visual tokens that is kept."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    panels = ((left, measured.ttft_s, plan.alone), (right, measured.requests_per_s, plan.loaded))
    for axes, series, chosen in panels:
        for method in dict.fromkeys(variant.label for variant in chosen if variant.stage):
            points = _falling(chosen, method)
            shares = [100 * point.share for point in points]
            medians = [series.median(point) for point in points]
            low, high = zip(*(series.spread(point) for point in points), strict=True)
            (line,) = axes.plot(shares, medians, marker="o", label=method)
            axes.fill_between(shares, low, high, alpha=0.15, color=line.get_color())
        axes.axhline(series.median(OFF), color="0.5", linestyle="--", linewidth=1, label="off")
        axes.set(xlabel="visual tokens kept, %", ylim=(0, None), xlim=(0, 105))
        axes.legend(fontsize=8)
    left.set(title="one request", ylabel="time to first token, s")
    right.set(title=f"{plan.batch} requests at once", ylabel="requests/s")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(measured: Measured, plan: Plan, where: Mapping[str, str], about: str, folder: Path, name: str) -> str:
    """Write ``NAME.md``, ``NAME.json`` and ``NAME.png`` into ``folder``; the page."""
    folder.mkdir(parents=True, exist_ok=True)
    text = page(measured, plan, where, about)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    values = json.dumps(document(measured, plan, where, about), indent=1)
    (folder / f"{name}.json").write_text(values + "\n", encoding="utf-8")
    plot(measured, plan, folder / f"{name}.png")
    return text


def _falling(chosen: Sequence[Variant], method: str) -> list[Variant]:
    """Off, and the method's budgets from the largest to the smallest."""
    return [OFF, *sorted((item for item in chosen if item.label == method), key=lambda item: -item.share)]


def _faster(measured: Measured, variant: Variant) -> list[float]:
    return [1 / ratio for ratio in measured.ttft_s.over_off(variant)]


def _rounds(series: Series) -> str:
    count = len(series.values[OFF])
    return f"{count} round{'' if count == 1 else 's'}"


def _processors(series: Series, variant: Variant) -> tuple[str, str]:
    """Processor time, and how many times less than without compression; empty where it is not known."""
    if not series.median(variant):
        return "", ""
    less = [1 / ratio for ratio in series.over_off(variant)]
    return f"{series.median(variant):.1f}", f"{statistics.median(less):.2f}"


def _share(variant: Variant) -> str:
    return f"{100 * variant.share:g} %"


def _spread(series: Series, variant: Variant, digits: int) -> str:
    low, high = series.spread(variant)
    return f"{series.median(variant):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _ratio(values: Sequence[float]) -> str:
    return f"**{statistics.median(values):.2f}** ({min(values):.2f} to {max(values):.2f})"
