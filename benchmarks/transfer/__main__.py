"""Links between two processes beside raw NIXL, Mooncake and memcpy; with ``--end-to-end``, what they cost a request.

    python -m benchmarks.transfer [--rounds N] [--sizes KIB,KIB,...] [--end-to-end] [--out FOLDER] [--cache FOLDER]

Links are measured twice: as NIXL connects two processes of one machine, and in a second process with ``UCX_TLS=tcp``,
where Mooncake's TCP engine takes part. It lives in an environment of its own in the cache folder, made when it is not
there; where it cannot be installed its column is missing and the page says why. Contenders take turns at each size in
every round, and the median of each one's best round counts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.transfer import end_to_end, links, mooncake, report

RESULTS: Final = Path(__file__).resolve().parents[1] / "results"
_TCP: Final = {"UCX_TLS": "tcp"}
_TCP_TIMEOUT_S: Final = 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = _parser().parse_args(argv)
    sizes = [int(size) << 10 for size in options.sizes.split(",")]
    if options.tcp_samples is not None:
        _measure_tcp(sizes, options.rounds, options.cache, options.tcp_samples)
        return 0
    memory = links.measure(sizes, ("shm", "nixl"), rounds=options.rounds)
    tcp, missing = _tcp(options)
    lines = [
        "# KV transfer",
        "",
        "GB/s (10^9 bytes) of one write between two processes of one machine, from the call until bytes and notification",
        "are with the peer: the median of the best of so many rounds in which all took turns. Ratios are within this run.",
        "",
        f"Rounds: {options.rounds}. Processors: {os.cpu_count()}. Load average at the end: {os.getloadavg()[0]:.1f}.",
        "",
        "## As NIXL connects processes of one machine (process_vm_writev)",
        "",
        report.link_table(memory, sizes, report.MEMORY_RATIOS),
        "",
        "## Over TCP (loopback)",
        "",
        report.link_table(tcp, sizes, report.TCP_RATIOS),
        *(["", f"Mooncake did not take part: {missing}"] if missing else []),
    ]
    document: dict[str, Any] = {"memory": _figures(memory), "tcp": _figures(tcp)}
    if options.end_to_end:
        exposures = end_to_end.exposures(options.cache, options.images)
        qualities = end_to_end.qualities(options.per_family)
        lines += [
            "",
            "## A whole request",
            "",
            f"One prefill and one decode worker, a LLaVA-1.5-shaped checkpoint of random weights, {options.images} new",
            "pictures for each plan, one at a time. Exposed is what the transfer adds to the time to first token.",
            "",
            report.exposure_table(exposures),
            "",
            f"The reference model, {qualities[0].score.asked} held-out questions under each preset:",
            "",
            report.quality_table(qualities),
        ]
        document |= {
            "exposures": [dataclasses.asdict(row) for row in exposures],
            "qualities": [dataclasses.asdict(row) for row in qualities],
        }
    text = "\n".join(lines) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "transfer.md").write_text(text, encoding="utf-8")
    (options.out / "transfer.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    report.plot({"one machine": memory, "TCP": tcp}, sizes, options.out / "transfer.png")
    print(text, end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=links.ROUNDS)
    parser.add_argument("--sizes", default=",".join(str(size >> 10) for size in links.SIZES), help="in KiB")
    parser.add_argument("--end-to-end", action="store_true", help="requests through whole clusters, too")
    parser.add_argument("--images", type=int, default=end_to_end.IMAGES, help="new pictures for each plan")
    parser.add_argument("--per-family", type=int, default=end_to_end.PER_FAMILY, help="questions of each family")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/prismserve-bench").expanduser())
    parser.add_argument("--tcp-samples", type=Path, help=argparse.SUPPRESS)
    return parser


def _figures(samples: links.Samples) -> list[dict[str, Any]]:
    return [
        {"contender": name, "bytes": nbytes, "best_s": samples.best_s(name, nbytes), "rounds_s": rounds}
        for (name, nbytes), rounds in samples.rounds.items()
    ]


def _tcp(options: argparse.Namespace) -> tuple[links.Samples, str]:
    """Samples of a process in which UCX may use TCP only, and why Mooncake did not take part."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "samples.json")
        command = [sys.executable, "-m", "benchmarks.transfer", "--tcp-samples", str(path)]
        command += ["--rounds", str(options.rounds), "--sizes", options.sizes, "--cache", str(options.cache)]
        subprocess.run(command, check=True, timeout=_TCP_TIMEOUT_S, env={**os.environ, **_TCP})
        told = json.loads(path.read_text(encoding="utf-8"))
    samples = links.Samples()
    for name, nbytes, rounds in told["rounds"]:
        for seconds in rounds:
            samples.add(name, nbytes, seconds)
    return samples, told["missing"]


def _measure_tcp(sizes: Sequence[int], rounds: int, cache: Path, path: Path) -> None:
    missing = ""
    processors = links.halves()
    with contextlib.ExitStack() as stack:
        others: list[links.Contender] = []
        try:
            others.append(stack.enter_context(mooncake.opened(cache, max(sizes), processors)))
        except RuntimeError as error:
            missing = str(error).splitlines()[0]
        samples = links.measure(sizes, ("nixl",), others, rounds=rounds, processors=processors)
    told = [(name, nbytes, rounds) for (name, nbytes), rounds in samples.rounds.items()]
    path.write_text(json.dumps({"rounds": told, "missing": missing}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
