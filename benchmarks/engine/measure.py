"""The rounds: every workload by every system in turn, and what remains of them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.engine.bandwidth import READ_BYTES, read_bandwidth
from benchmarks.engine.systems.client import Result, System, Variant
from benchmarks.engine.workloads import ONE, Prompts, Workload

OURS: Final = "prismserve"
TTFT: Final = "ttft_s"
TPOT: Final = "tpot_s"
RATE: Final = "tokens_per_s"
OVERHEAD: Final = "overhead"
OVERHEAD_BATCH: Final = 16
CHECK_TOKENS: Final = 16
CHECK_SEED: Final = 999_983
WARM_SEED: Final = 1_000_003
_TRIAL_MARGIN: Final = 1.15
_TRIAL_TOKENS: Final = 8

Say = Callable[[str], None]
Keep = Callable[["Measured"], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        tokens: generated for each prompt.
        rounds: of every workload.
        threads: of each system, and cores it may use.
        workloads: what is measured.
        read_bytes: size of the array that the memory's speed is measured on.
    """

    tokens: int
    rounds: int
    threads: int
    workloads: tuple[Workload, ...]
    read_bytes: int = READ_BYTES


@dataclass(slots=True)
class Measured:
    """All of one model's figures.

    Attributes:
        model: its name.
        about: what each variant's server said of itself.
        samples: (variant, workload, figure) to its value in each round.
        first_tokens: variant to the first greedy tokens for one fixed prompt.
        dropped: variants left out after the trial, with TTFT and TPOT there, in seconds.
        bandwidth: bytes per second read from memory, in each round.
    """

    model: str
    about: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    samples: dict[tuple[str, str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    first_tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: dict[str, tuple[float, float]] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)

    def median(self, variant: str, workload: str, figure: str) -> float | None:
        """Over the rounds; None if it was not measured."""
        values = self.samples.get((variant, workload, figure))
        return statistics.median(values) if values else None

    def best(self, system: str, workload: str, figure: str) -> tuple[float, str] | None:
        """A system's best median over its variants, and which one gave it."""
        found = [
            (value, variant)
            for variant in self.about
            if variant.split()[0] == system and (value := self.median(variant, workload, figure)) is not None
        ]
        if not found:
            return None
        return max(found) if figure == RATE else min(found)


def measure(
    model: str,
    directory: Path,
    variants: Sequence[Variant],
    prompts: Prompts,
    plan: Plan,
    *,
    logs: Path,
    say: Say,
    keep: Keep,
) -> Measured:
    """Start all variants on one checkpoint, try them, and measure those that may win; kept after each round.

    Raises:
        RuntimeError: a system does not start or fails at its work.
    """
    measured = Measured(model)
    with ExitStack() as stack:
        systems = []
        for variant in variants:
            say(f"{model}: starting {variant.name}")
            log = logs / f"{model}-{variant.name.replace(' ', '-')}.log"
            system = stack.enter_context(System(variant, directory, plan.threads, log))
            measured.about[variant.name] = system.about
            systems.append(system)
        systems = _try_out(measured, systems, prompts, plan, say)
        for number in range(plan.rounds):
            measured.bandwidth.append(read_bandwidth(plan.threads, plan.read_bytes))
            for workload in plan.workloads:
                # The order turns with the rounds, so that nobody always follows the same one.
                turn = number % len(systems)
                for system in (*systems[turn:], *systems[:turn]):
                    if workload.keep is not None and system.variant.system != OURS:
                        continue
                    result = system.run(prompts.jobs(workload, number, plan.tokens))
                    _note(measured, system.variant.name, workload, result)
                    say(_line(number, workload, system.variant, result))
            keep(measured)
    return measured


def _try_out(measured: Measured, systems: Sequence[System], prompts: Prompts, plan: Plan, say: Say) -> list[System]:
    """Warm every system, compare first tokens, and leave out a dtype of a peer in which it is slower at everything."""
    trial: dict[str, tuple[float, float]] = {}
    for system in systems:
        name = system.variant.name
        check = system.run(prompts.jobs(ONE, CHECK_SEED, CHECK_TOKENS))
        measured.first_tokens[name] = check.answers[0][0]
        for workload in plan.workloads:
            if workload.batch <= 4 and (workload.keep is None or system.variant.system == OURS):
                system.run(prompts.jobs(workload, WARM_SEED, min(_TRIAL_TOKENS, plan.tokens)))
        result = system.run(prompts.jobs(ONE, WARM_SEED + 1, _TRIAL_TOKENS))
        trial[name] = (result.ttft_s, result.tpot_s)
        say(f"{measured.model}: {name} starts with TTFT {result.ttft_s:.2f} s, TPOT {1e3 * result.tpot_s:.0f} ms")
    kept = []
    for system in systems:
        own = trial[system.variant.name]
        rivals = [trial[other.variant.name] for other in systems if other.variant.system == system.variant.system]
        if all(
            value > _TRIAL_MARGIN * min(column) for value, column in zip(own, zip(*rivals, strict=True), strict=True)
        ):
            say(f"{measured.model}: {system.variant.name} is slower at everything and left out")
            measured.dropped[system.variant.name] = own
            system.close()
        else:
            kept.append(system)
    return kept


def _note(measured: Measured, name: str, workload: Workload, result: Result) -> None:
    measured.samples[name, workload.name, RATE].append(result.tokens_per_s)
    if workload.batch == 1:
        measured.samples[name, workload.name, TTFT].append(result.ttft_s)
        measured.samples[name, workload.name, TPOT].append(result.tpot_s)
    if result.more.get("decode_steps"):
        outside = 1 - result.more["model_s"] / result.more["step_s"]
        measured.samples[name, workload.name, OVERHEAD].append(outside)


def _line(number: int, workload: Workload, variant: Variant, result: Result) -> str:
    return (
        f"round {number + 1} {workload.name:9} {variant.name:22} TTFT {result.ttft_s:6.2f} s  "
        f"TPOT {1e3 * result.tpot_s:6.1f} ms  {result.tokens_per_s:6.2f} tokens/s"
    )
