"""The tiers below the KV pool, beside memcpy, raw O_DIRECT reads, LMCache and computing everything again.

    python -m benchmarks.tiers [--folder FOLDER] [--rounds N] [--prompts N] [--repeats N] [--model MODEL]
                               [--peer lmcache] [--peer-python PYTHON] [--out FOLDER]

``--folder`` is where files are written: name one on the drive to be measured. ``--peer lmcache`` restores from LMCache's
local CPU backend in the same rounds, in an environment of its own, made in ``--folder`` unless ``--peer-python`` names
an interpreter that has it. Writes ``tiers.md`` and ``tiers.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.tables import markdown_table
from benchmarks.tiers.peers import LAYOUT, LMCACHE, ONE_THREAD, OURS, UNCHECKED, lmcache_environment, restore_rates
from benchmarks.tiers.restores import Case, disk_only, restores
from benchmarks.tiers.stores import Rates, disk_rates, host_rates
from prismserve.kv_transfer.tiers.config import TierConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS: Final = Path(__file__).resolve().parents[1] / "results"
BLOCK_BYTES: Final = LAYOUT.token_bytes * LAYOUT.block_tokens
DISK_THREADS: Final = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = _options(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tiers-", dir=options.folder) as temporary:
        folder = Path(temporary)
        host = host_rates(BLOCK_BYTES, options.blocks, options.rounds)
        disk, direct = disk_rates(folder, BLOCK_BYTES, options.blocks, options.rounds, DISK_THREADS)
        python, missing = _lmcache(options, folder)
        restored = restore_rates(options.blocks, options.rounds, python)
        served = {
            "host": asyncio.run(
                restores(options.prompts, options.repeats, TierConfig(host_bytes=1 << 30), options.model)
            ),
            "disk": asyncio.run(
                restores(options.prompts, options.repeats, disk_only(folder / "served"), options.model)
            ),
        }
    text = page(host, disk, restored, served, direct=direct, missing=missing, model=options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tiers.md").write_text(text)
    figures = {
        "block_bytes": BLOCK_BYTES,
        "direct": direct,
        "bytes_per_s": {**host.rounds, **disk.rounds, **{f"restore {k}": v for k, v in restored.rounds.items()}},
        "requests": {tier: [asdict(case) for case in cases] for tier, cases in served.items()},
        "load_average": os.getloadavg()[0],
    }
    (options.out / "tiers.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text, end="")
    return 0


def page(
    host: Rates,
    disk: Rates,
    restored: Rates,
    served: dict[str, list[Case]],
    *,
    direct: bool,
    missing: str,
    model: str,
) -> str:
    """The page of results."""
    reads = "O_DIRECT" if direct else "page cache, since this file system does not take O_DIRECT"
    rows = [
        *(_rate_row(host, name, "memcpy", "0.60") for name in ("host put", "host get")),
        _rate_row(disk, "disk get", "raw read", "0.80"),
    ]
    if LMCACHE in restored.rounds:
        rows += [
            _rate_row(restored, OURS, LMCACHE, "1.00", shown="restore into a KV pool"),
            _rate_row(restored, ONE_THREAD, LMCACHE, "", shown="the same with one thread"),
            _rate_row(restored, UNCHECKED, LMCACHE, "", shown="the same with one thread and no checksum"),
        ]
    intro = (
        f"Blocks of {BLOCK_BYTES >> 10} KiB, one thread; the file with {DISK_THREADS} threads, for the tier and for raw "
        f"reads ({reads}); a restore with as many as a worker gives it on this machine, at most {DISK_THREADS}. GB are "
        "10^9 bytes; ratios are medians over rounds of what ran in the same round. Every read of a tier compares the "
        "block's checksum unless it says otherwise; memcpy, raw reads and LMCache, which has one thread, do not."
    )
    requests = (
        f"Requests to one worker serving `{model}`, each first with nothing held, then with its KV in the tier only. A "
        "restore is slower where blocks were restored and the first token came later than when it was all computed."
    )
    end = (
        f"Load average of the {os.cpu_count()} cores when it ended: {os.getloadavg()[0]:.1f}. "
        "Written by `python -m benchmarks.tiers`."
    )
    header = ["tier", "requests", "restored", "restore slower", "target", "TTFT computed (p50)", "TTFT again (p50)"]
    tables = [
        markdown_table(["", "GB/s", "beside", "GB/s", "ratio", "target"], rows),
        markdown_table(header, [_served_row(tier, cases) for tier, cases in served.items()]),
    ]
    tried = Path(__file__).with_name("tried.md").read_text(encoding="utf-8").strip()
    rates = [intro, tables[0], *([missing] if missing else [])]
    parts = ["# Tiers below the KV pool", *rates, requests, tables[1], tried, end]
    return "\n\n".join(parts) + "\n"


def _rate_row(rates: Rates, name: str, base: str, target: str, shown: str = "") -> list[str]:
    return [
        shown or name,
        f"{rates.median(name) / 1e9:.2f}",
        base,
        f"{rates.median(base) / 1e9:.2f}",
        f"{rates.ratio(name, base):.2f}",
        f">= {target}" if target else "",
    ]


def _served_row(tier: str, cases: Sequence[Case]) -> list[str]:
    slower = sum(case.slower for case in cases)
    return [
        tier,
        str(len(cases)),
        str(sum(case.restored for case in cases)),
        f"{slower} ({100 * slower / len(cases):.1f} %)",
        "<= 1 %",
        f"{1e3 * statistics.median(case.computed_s for case in cases):.1f} ms",
        f"{1e3 * statistics.median(case.again_s for case in cases):.1f} ms",
    ]


def _lmcache(options: Any, folder: Path) -> tuple[Path | None, str]:
    """An interpreter with LMCache, or None and why not."""
    if options.peer_python is not None:
        return options.peer_python, ""
    if options.peer is None:
        return None, "LMCache was not measured in this run (`--peer lmcache`)."
    try:
        return lmcache_environment(folder / "lmcache"), ""
    except RuntimeError as error:
        return None, f"LMCache could not be installed: {str(error).splitlines()[-1]}."


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiers", description="Speed of the tiers.")
    parser.add_argument("--folder", type=Path, default=None, help="where files are written; default: temporary")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=512, help="blocks moved in each round")
    parser.add_argument("--prompts", type=int, default=100, help="requests for each tier")
    parser.add_argument("--repeats", type=int, default=3, help="times each is asked each way")
    parser.add_argument("--model", default="reference", help="checkpoint directory or name")
    parser.add_argument("--peer", choices=["lmcache"], help="also measure this system")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
