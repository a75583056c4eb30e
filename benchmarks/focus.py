"""Attention of one step of decoding that reads chosen cache slots, beside one that reads them all.

    python -m benchmarks.focus [--contexts 1024,4096,16384] [--shares 0.5,0.3,0.1] [--repeats N] [--out FOLDER]

One sequence, one new token, one layer shaped as those of a 7B model with grouped queries, float32 on one CPU thread. The
slots are chosen at random and read where they lie, one by one; the table that names them is made once per step and
serves every layer that reads the choice. Writes ``focus.md`` and ``focus.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.tables import markdown_table
from prismserve.kernels.paged_attention import PagedBatch, attend, plan_batch
from prismserve.kernels.paged_cache import LayerKV, by_slot, slot_blocks

HEADS: Final = 28
KV_HEADS: Final = 4
HEAD_DIM: Final = 128
BLOCK_TOKENS: Final = 16
LAYERS: Final = 28
SCALE: Final = HEAD_DIM**-0.5
TOLERANCE: Final = 1e-4


def medians_ms(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median CPU time of the thread in milliseconds of each run; they take turns, so that what disturbs meets them all."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            began = time.thread_time()
            run()
            taken.append(1000 * (time.thread_time() - began))
    return [statistics.median(taken) for taken in times]


def measure(context: int, shares: Sequence[float], repeats: int) -> list[dict[str, Any]]:
    """Rows for one context of ``context`` slots, the whole of it first; what is read is compared before it is timed."""
    generator = torch.Generator().manual_seed(context)
    groups = -(-context // BLOCK_TOKENS)
    # A second layer lies between the groups, as in the pool.
    layer = torch.randn(groups, 2, 2, BLOCK_TOKENS, KV_HEADS, HEAD_DIM, generator=generator)[:, 1]
    q = torch.randn(1, HEADS, HEAD_DIM, generator=generator)
    table = torch.randperm(groups, generator=generator).tolist()
    whole = plan_batch([table], [1], [context], BLOCK_TOKENS)
    view = by_slot(layer)
    runs: list[Callable[[], object]] = [partial(attend, q, layer, whole, SCALE)]
    for share in shares:
        count = max(1, round(share * context))
        chosen = torch.randperm(context, generator=generator)[:count].sort().values.tolist()
        slots = [table[slot // BLOCK_TOKENS] * BLOCK_TOKENS + slot % BLOCK_TOKENS for slot in chosen]
        singly = plan_batch([slot_blocks(layer, slots)], [1], [count], 1)
        gathered = layer.transpose(1, 2).reshape(-1, 2, KV_HEADS, HEAD_DIM)[slots].transpose(0, 1)[None]
        expected = attend(q, gathered, plan_batch([[0]], [1], [count], count), SCALE)
        if (attend(q, view, singly, SCALE) - expected).abs().max() > TOLERANCE:
            message = f"attention over {count} chosen slots is not attention over their keys and values"
            raise ArithmeticError(message)
        runs += [partial(attend, q, view, singly, SCALE), partial(_table, layer, slots)]
    whole_ms, *others = medians_ms(runs, repeats)
    rows = [{"context": context, "share": 1.0, "attention_ms": whole_ms, "table_ms": 0.0, "times": 1.0}]
    for share, attention_ms, table_ms in zip(shares, others[::2], others[1::2], strict=True):
        times = LAYERS * whole_ms / (LAYERS * attention_ms + table_ms)
        one = {"context": context, "share": share, "attention_ms": attention_ms, "table_ms": table_ms, "times": times}
        rows.append(one)
    return rows


def _table(layer: LayerKV, slots: Sequence[int]) -> PagedBatch:
    return plan_batch([slot_blocks(layer, slots)], [1], [len(slots)], 1)


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The results as markdown."""
    header = ["context", "read", "attention ms", "table ms", "times as fast"]
    body = [
        [
            str(row["context"]),
            f"{100 * row['share']:.0f} %",
            f"{row['attention_ms']:.2f}",
            f"{row['table_ms']:.2f}" if row["share"] < 1.0 else "",
            f"{row['times']:.1f}",
        ]
        for row in rows
    ]
    lines = [
        "# Reading chosen cache slots",
        "",
        f"One step of one sequence in one layer of {HEADS} query and {KV_HEADS} KV heads of {HEAD_DIM} channels, float32, one",
        "CPU thread, times as CPU time of the thread. *table* is made once per step; *times as fast* spreads it over",
        f"{LAYERS} layers that read the choice.",
        "",
        markdown_table(header, body, left=0),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.focus``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.focus", description=__doc__.partition("\n")[0])
    parser.add_argument("--contexts", default="1024,4096,16384", help="cache slots (default: %(default)s)")
    parser.add_argument("--shares", default="0.5,0.3,0.1", help="of them that are read (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="runs of each (default: 30)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    arguments = parser.parse_args(argv)
    contexts = [int(part) for part in arguments.contexts.split(",")]
    shares = [float(part) for part in arguments.shares.split(",")]
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [row for context in contexts for row in measure(context, shares, arguments.repeats)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "focus.md").write_text(page(rows), encoding="utf-8")
    (arguments.out / "focus.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", "utf-8")
    print(page(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
