"""Speed of the prefix index, beside ai-dynamo-runtime's RadixTree and redis-py, in one run.

    python -m benchmarks.index [--dynamo-python PYTHON | --no-dynamo] [--rounds N] [--out FILE]

Match of 128 and 2,048 blocks, insertion and memory per block at 10^4, 10^5 and 10^6 blocks, for the router's mirror,
for the radix tree and for ``MGET`` against the embedded Valkey; then, through the embedded Valkey, how late a mirror is
and how fast 10^6 blocks are rebuilt. Without ``--dynamo-python`` (an interpreter that has ai-dynamo-runtime) a virtual
environment is made for it in a temporary folder with pip.

Every index runs alone in a process of its own, in turns, ``--rounds`` times; the smallest median counts, which is what
a busy machine disturbs least. *First* is the first lookup of a chain after its announcement, which also proves its
order; *again* is every later one. Prints markdown, and writes it with ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.index.served import lag_ms, mget_us, rebuild_s

SIZES: Final = (10_000, 100_000, 1_000_000)
DYNAMO: Final = "ai-dynamo-runtime==1.6.1"
LAG_ANNOUNCEMENTS: Final = 1000
PROBE_TIMEOUT_S: Final = 900.0
LENGTHS: Final = (128, 2048)

Figures = dict[str, float]


def main() -> None:
    """Run everything and print the tables."""
    arguments = _parser().parse_args()
    with _dynamo_python(arguments.dynamo_python, wanted=not arguments.no_dynamo) as dynamo:
        tried = Path(__file__).with_name("tried.md").read_text(encoding="utf-8").strip()
        lines = [
            "# Prefix index",
            "",
            _intro(arguments.rounds),
            "",
            *_stores(dynamo, arguments.rounds),
            "",
            *_served(),
            "",
            tried,
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def _intro(rounds: int) -> str:
    return (
        f"`python -m benchmarks.index --rounds {rounds}`. Times are the smallest median of the rounds; RadixTree is that of "
        f"{DYNAMO.replace('==', ' ')}, MGET that of redis-py with hiredis."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description="Speed of the prefix index.")
    parser.add_argument("--dynamo-python", type=Path, help="an interpreter that can import dynamo")
    parser.add_argument("--no-dynamo", action="store_true", help="leave the radix tree out")
    parser.add_argument("--rounds", type=int, default=3, help="how often each index is measured")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    return parser


@contextmanager
def _dynamo_python(given: Path | None, *, wanted: bool) -> Iterator[Path | None]:
    """An interpreter with ai-dynamo-runtime, in an environment that lasts as long as the benchmark."""
    if given is not None or not wanted:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", DYNAMO], check=True)
        yield python


def _stores(dynamo: Path | None, rounds: int) -> list[str]:
    lines = [
        "| blocks | index | match 128 (µs): first, again, p99 | 2,048 (µs): first, again, p99 | insert (µs) | memory (B) |",
        "|---|---|---|---|---|---|",
    ]
    for blocks in SIZES:
        mirrors, trees = [], []
        for _ in range(rounds):
            mirrors.append(_probe(Path(sys.executable), "mirror", blocks))
            if dynamo is not None:
                trees.append(_probe(dynamo, "radix", blocks))
        mirror = _best(mirrors)
        lines.append(_row(blocks, "mirror", mirror))
        if trees:
            tree = _best(trees)
            lines.append(_row(blocks, "RadixTree", tree))
            names = [f"match_{length}_{which}_p50_us" for length in LENGTHS for which in ("first", "again")]
            ratios = [tree[name] / mirror[name] for name in (*names, "insert_us_per_block", "memory_bytes_per_block")]
            one, two, three, four, insert, memory = (f"{ratio:.1f}x" for ratio in ratios)
            lines.append(f"| | RadixTree / mirror | {one}, {two} | {three}, {four} | {insert} | {memory} |")
        asked = mget_us(blocks)
        short, long = (
            f"{asked[f'mget_{length}_p50_us']:.0f} "
            f"({asked[f'mget_{length}_p50_us'] / mirror[f'match_{length}_again_p50_us']:.0f}x again)"
            for length in LENGTHS
        )
        lines.append(f"| | redis-py MGET | {short} | {long} | | |")
    return lines


def _probe(python: Path, store: str, blocks: int) -> Figures:
    command = [python, Path(__file__).with_name("probe.py"), store, str(blocks)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PROBE_TIMEOUT_S, env=environment)
    figures: Figures = json.loads(done.stdout)
    return figures


def _best(rounds: list[Figures]) -> Figures:
    return {name: min(one[name] for one in rounds) for name in rounds[0]}


def _row(blocks: int, name: str, figures: Figures) -> str:
    cells = [
        ", ".join(f"{figures[f'match_{length}_{which}_us']:.1f}" for which in ("first_p50", "again_p50", "again_p99"))
        for length in LENGTHS
    ]
    insert, memory = figures["insert_us_per_block"], figures["memory_bytes_per_block"]
    return f"| {blocks:,} | {name} | {cells[0]} | {cells[1]} | {insert:.2f} | {memory:.0f} |"


def _served() -> list[str]:
    lags = sorted(lag_ms(LAG_ANNOUNCEMENTS, SIZES[1]))
    p50, p99 = (lags[int(len(lags) * share)] for share in (0.5, 0.99))
    rebuilt = rebuild_s(SIZES[-1])
    return [
        "| through the embedded Valkey | |",
        "|---|---|",
        f"| announcement of 16 blocks to the mirror's answer, at 10^5 blocks | p50 {p50:.1f} ms, p99 {p99:.1f} ms |",
        f"| snapshot of 10^6 blocks by a new mirror | {rebuilt['snapshot_s']:.1f} s |",
        f"| FLUSHALL until 4 owners have announced 10^6 blocks again | {rebuilt['flushed_s']:.1f} s |",
        "",
        f"Load average during the run: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.",
    ]


if __name__ == "__main__":
    main()
