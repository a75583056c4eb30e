"""The rounds: every variant in turn, first alone, then many requests at once."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.load.work import OFF, Ran, System, Variant, draw

WARM_SEED: Final = 1_000_003
LOAD_SEED: Final = 10_000
_WARM_TOKENS: Final = 2

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        alone: variants of the time to first token.
        loaded: variants of the throughput.
        alone_rounds: rounds of the former.
        loaded_rounds: rounds of the latter.
        batch: requests at once.
        tokens: generated for each of them.
        threads: of the engine.
    """

    alone: tuple[Variant, ...]
    loaded: tuple[Variant, ...]
    alone_rounds: int
    loaded_rounds: int
    batch: int
    tokens: int
    threads: int = 1


@dataclass(slots=True)
class Series:
    """One figure in every round of every variant."""

    values: dict[Variant, list[float]] = field(default_factory=lambda: defaultdict(list))

    def median(self, variant: Variant) -> float:
        """Over the rounds."""
        return statistics.median(self.values[variant])

    def spread(self, variant: Variant) -> tuple[float, float]:
        """Least and most."""
        return min(self.values[variant]), max(self.values[variant])

    def over_off(self, variant: Variant) -> list[float]:
        """What the variant gave, as a multiple of what no compression gave in the same round."""
        return [value / base for value, base in zip(self.values[variant], self.values[OFF], strict=True)]


@dataclass(slots=True)
class Measured:
    """All figures.

    Attributes:
        ttft_s: time to first token of one request alone, in seconds.
        ttft_cpu_s: processor time until then, which other work on the machine hardly changes.
        requests_per_s: under load.
        tokens_per_s: under load.
        loaded_cpu_s: processor time of the whole batch.
        waited_s: median time to first token of a request under load.
        alone: the last run of each variant alone.
        loaded: the last run of each variant under load.
        load_average: of the machine, at the beginning of each round.
    """

    ttft_s: Series = field(default_factory=Series)
    ttft_cpu_s: Series = field(default_factory=Series)
    requests_per_s: Series = field(default_factory=Series)
    tokens_per_s: Series = field(default_factory=Series)
    loaded_cpu_s: Series = field(default_factory=Series)
    waited_s: Series = field(default_factory=Series)
    alone: dict[Variant, Ran] = field(default_factory=dict)
    loaded: dict[Variant, Ran] = field(default_factory=dict)
    load_average: list[float] = field(default_factory=list)


def turned(items: Sequence[Variant], number: int) -> tuple[Variant, ...]:
    """In another order in every round, so that nobody always follows the same one."""
    places = (3 * number) % len(items)
    return (*items[places:], *items[:places])


async def measure(system: System, plan: Plan, say: Say, keep: Callable[[Measured], object]) -> Measured:
    """Warm every method, then measure, a round of each part in turn; RuntimeError if an answer fails.

    What there is is handed to ``keep`` after each round: a long run must not be lost with its last minute.
    """
    measured = Measured()
    for variant in _smallest((*plan.alone, *plan.loaded)):
        await system.run(draw(WARM_SEED, 1, _WARM_TOKENS, variant))
    for number in range(max(plan.alone_rounds, plan.loaded_rounds)):
        measured.load_average.append(os.getloadavg()[0])
        if number < plan.alone_rounds:
            await _alone(system, plan, measured, number, say)
        if number < plan.loaded_rounds:
            await _loaded(system, plan, measured, number, say)
        keep(measured)
    return measured


async def _alone(system: System, plan: Plan, measured: Measured, number: int, say: Say) -> None:
    for variant in turned(plan.alone, number):
        ran = await system.run(draw(number, 1, 1, variant))
        first_s = ran.answers[0].first_s
        measured.alone[variant] = ran
        measured.ttft_s.values[variant].append(first_s)
        measured.ttft_cpu_s.values[variant].append(ran.cpu_s)
        say(f"round {number + 1} alone  {variant.name:26} TTFT {first_s:6.2f} s  {ran.cpu_s:6.2f} s of processors")


async def _loaded(system: System, plan: Plan, measured: Measured, number: int, say: Say) -> None:
    for variant in turned(plan.loaded, number):
        ran = await system.run(draw(LOAD_SEED + number, plan.batch, plan.tokens, variant))
        measured.loaded[variant] = ran
        measured.requests_per_s.values[variant].append(ran.requests_per_s)
        measured.tokens_per_s.values[variant].append(ran.tokens_per_s)
        measured.loaded_cpu_s.values[variant].append(ran.cpu_s)
        measured.waited_s.values[variant].append(statistics.median(answer.first_s for answer in ran.answers))
        say(
            f"round {number + 1} loaded {variant.name:26} {ran.requests_per_s:6.3f} requests/s  "
            f"{ran.tokens_per_s:6.2f} tokens/s  {ran.cpu_s:6.1f} s of processors  {ran.peak_blocks} blocks"
        )


def _smallest(variants: Sequence[Variant]) -> list[Variant]:
    """No compression, and each method at its smallest budget."""
    least: dict[str, Variant] = {}
    for variant in variants:
        if variant.label not in least or variant.share < least[variant.label].share:
            least[variant.label] = variant
    return list(least.values())
