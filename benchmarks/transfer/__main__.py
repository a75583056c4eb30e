"""Links between two processes beside raw NIXL, Mooncake and memcpy; or, with ``--end-to-end``, whole requests.

    python -m benchmarks.transfer [--rounds N] [--sizes KIB,KIB,...] [--out FOLDER] [--cache FOLDER]
    python -m benchmarks.transfer --end-to-end [exposed] [accuracy] [--rounds N] [--per-family N]
        [--start-timeout-s SECONDS] [--quick] [--out FOLDER] [--cache FOLDER]

Links are measured twice: as NIXL connects two processes of one machine, and in a second process with ``UCX_TLS=tcp``,
where Mooncake's TCP engine takes part. It lives in an environment of its own in the cache folder, made when it is not
there; where it cannot be installed its column is missing and the page says why. Contenders take turns at each size in
every round, and the median of each one's best round counts.

Whole requests go through one prefill and one decode worker: what of the time to first token of a LLaVA-shaped model is
waiting for KV, and how many bytes the bundled model's pictures take at which accuracy. ``transfer_end_to_end.md`` and
``.json`` are written after each part; a part that is not named stays on the page as it was measured last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.transfer import end_to_end, links, mooncake, report
from prismserve.core.errors import PrismServeError

RESULTS: Final = Path(__file__).resolve().parents[1] / "results"
_TCP: Final = {"UCX_TLS": "tcp"}
_TCP_TIMEOUT_S: Final = 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.end_to_end is not None:
        return _end_to_end(parser, options)
    options.rounds = links.ROUNDS if options.rounds is None else options.rounds
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
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
    document = {"memory": _figures(memory), "tcp": _figures(tcp)}
    text = "\n".join(lines) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "transfer.md").write_text(text, encoding="utf-8")
    (options.out / "transfer.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    report.plot({"one machine": memory, "TCP": tcp}, sizes, options.out / "transfer.png")
    print(text, end="")
    return 0


def _end_to_end(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    parts = options.end_to_end or end_to_end.PARTS
    unknown = [part for part in parts if part not in end_to_end.PARTS]
    if unknown:
        parser.error(f"--end-to-end: unknown parts {', '.join(unknown)}; there are {', '.join(end_to_end.PARTS)}")
    asked = end_to_end.Options(
        parts=parts,
        rounds=end_to_end.ROUNDS if options.rounds is None else options.rounds,
        per_family=options.per_family,
        quick=options.quick,
        start_timeout_s=options.start_timeout_s,
        cache=options.cache,
    )
    if min(asked.rounds, asked.per_family) < 1 or asked.start_timeout_s <= 0:
        parser.error("--rounds and --per-family must be at least 1, and --start-timeout-s more than 0")
    try:
        print(end_to_end.run(asked, options.out), end="")
    except (PrismServeError, RuntimeError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, help=f"of links ({links.ROUNDS}), or requests ({end_to_end.ROUNDS})")
    parser.add_argument("--sizes", default=",".join(str(size >> 10) for size in links.SIZES), help="of links, in KiB")
    parser.add_argument(
        "--end-to-end",
        nargs="*",
        metavar="PART",
        help=f"whole requests instead of links; parts: {', '.join(end_to_end.PARTS)} (default: all)",
    )
    parser.add_argument(
        "--per-family", type=int, default=end_to_end.PER_FAMILY, help="questions of each family (default: %(default)s)"
    )
    parser.add_argument(
        "--start-timeout-s",
        type=float,
        default=end_to_end.START_TIMEOUT_S,
        help="how long a worker may take to be ready (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="whole requests to a tiny model: does it all work?")
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
