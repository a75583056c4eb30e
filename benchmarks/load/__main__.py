"""What compression buys end to end: time to first token, throughput under load, and memory.

    python -m benchmarks.load [--cluster] [--methods a,b] [--loaded a] [--rounds N] [--load-rounds N] [--out FOLDER]

The LLaVA-shaped model of ``python -m benchmarks.engine`` (0.45 billion random weights, 576 visual tokens an image) answers
seeded questions about seeded pictures, uncompressed and at a half, a quarter and an eighth of the visual tokens: one at a
time for the time to first token, then many at once for the throughput. The rows take turns within a round. By default an
engine in this process answers; with --cluster, a router, a prefill process and a decode process. Writes ``load.md``,
``load.json`` and ``load.png`` (with --cluster ``cluster_load``); takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.engine import checkpoints
from benchmarks.engine.__main__ import cores
from benchmarks.engine.report import conditions
from benchmarks.load import report
from benchmarks.load.checkpoint import checkpoint
from benchmarks.load.local import LocalEngine
from benchmarks.load.measure import Measured, Plan, measure
from benchmarks.load.served import Served
from benchmarks.load.work import variants
from prismserve.compression import loader

METHODS: Final = "prism,visionzip,random,prefill/pyramiddrop"
LOADED: Final = "prism"
TINY: Final = dataclasses.replace(checkpoints.LLAVA_TINY, layers=4)
"""Of as many layers as cuts of a prefill method need."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=METHODS, help="of the time to first token (default: %(default)s)")
    parser.add_argument("--loaded", default=LOADED, help="of the throughput (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="of the time to first token (default: %(default)s)")
    parser.add_argument("--load-rounds", type=int, default=2, help="of the throughput (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="requests at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="generated for each of them (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="cores (default: %(default)s)")
    parser.add_argument("--cluster", action="store_true", help="through worker processes")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, to try the command")
    cache = Path("~/.cache/prismserve-bench").expanduser()
    parser.add_argument("--cache", type=Path, default=cache, help="folder of the model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    arguments = parser.parse_args(argv)
    for name in ("rounds", "load_rounds", "batch", "tokens", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in f"{arguments.methods},{arguments.loaded}".split(","):
        stage, _, method = name.rpartition("/")
        known = loader.names(stage or "visual") if stage in {"", "visual", "prefill"} else ()
        if method not in known or method == "none":
            parser.error(f"no method {name!r}; a visual method is called by its name, a prefill method prefill/NAME")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    arguments = parse(argv)
    began = time.monotonic()
    shape = TINY if arguments.tiny else checkpoints.LLAVA
    arguments.cache.mkdir(parents=True, exist_ok=True)
    directory = checkpoint(arguments.cache, shape)
    plan = Plan(
        variants(arguments.methods.split(",")),
        variants(arguments.loaded.split(",")),
        arguments.rounds,
        arguments.load_rounds,
        arguments.batch,
        arguments.tokens,
        arguments.threads,
    )
    visual = (shape.image_px // shape.patch_px) ** 2
    model = f"A LLaVA-shaped model, {shape.layers} layers of {shape.hidden}, {visual} visual tokens an image, random weights"
    where = {**conditions(arguments.threads), "model": model}
    name = "cluster_load" if arguments.cluster else "load"

    async def answer() -> str:
        """Start what answers, measure it and write; the page."""
        system = (Served if arguments.cluster else LocalEngine)(directory, arguments.threads)

        def keep(measured: Measured) -> str:
            return report.write(measured, plan, where, system.about, arguments.out, name)

        async with system:
            return keep(await measure(system, plan, lambda line: print(line, flush=True), keep))

    with cores(arguments.threads):
        print(asyncio.run(answer()))
    print(f"written to {arguments.out} after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
