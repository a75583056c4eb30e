"""Links between two processes beside raw NIXL and memcpy: a table and a JSON file.

    python -m benchmarks.transfer [--rounds N] [--sizes KIB,KIB,...] [--out FOLDER]

All contenders take turns within one run; ratios are of medians. ``UCX_TLS=tcp`` in the environment compares over TCP.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.transfer import links

RESULTS: Final = Path(__file__).resolve().parents[1] / "results"


def table(samples: links.Samples, sizes: Sequence[int]) -> str:
    """GB/s by contender and size, and the ratios that matter."""
    names = samples.names()
    lines = [f"| KiB | {' | '.join(names)} | shm / raw | shm / memcpy | nixl / raw |", "|" + "---|" * (len(names) + 4)]
    for nbytes in sizes:
        rate = {name: samples.gigabytes_per_s(name, nbytes) for name in names}
        ratios = (
            rate["shm"] / rate["raw nixl"],
            rate["shm"] / rate["memcpy"],
            rate["nixl"] / rate["raw nixl"],
        )
        cells = [f"{rate[name]:.2f}" for name in names] + [f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {nbytes >> 10} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.transfer", description="Speed of KV transfer between processes.")
    parser.add_argument("--rounds", type=int, default=links.ROUNDS)
    parser.add_argument("--sizes", default=",".join(str(size >> 10) for size in links.SIZES), help="in KiB")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    sizes = [int(size) << 10 for size in options.sizes.split(",")]
    samples = links.measure(sizes, ("shm", "nixl"), raw=True, rounds=options.rounds)
    suffix = "_tcp" if os.environ.get("UCX_TLS") == "tcp" else ""
    text = (
        "GB/s (10^9 bytes) at the median write between two processes; ratios within this run.\n\n"
        + table(samples, sizes)
        + f"\nLoad average of the {os.cpu_count()} cores when it ended: {os.getloadavg()[0]:.1f}. "
        + "Written by `python -m benchmarks.transfer`.\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"transfer{suffix}.md").write_text(text)
    figures = [
        {"contender": name, "bytes": nbytes, "median_s": samples.median_s(name, nbytes)}
        for name in samples.names()
        for nbytes in sizes
    ]
    (options.out / f"transfer{suffix}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
