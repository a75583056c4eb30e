"""What a router has learnt of its workers' speed from their reports, and how far its predictions were off."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prismserve.core.types import Tier
from prismserve.kv_transfer.costs import Overheads, Rates, Way
from prismserve.kv_transfer.latency import Average, CurveFit, PrefillCurve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from prismserve.core.types import PrefillReport, RouteDecision, RoutePrediction, WorkerStats
    from prismserve.router.config import RouterConfig

_REFRESH_S: Final = 0.25
"""How old the rates of links and tiers may be."""
_WORKERS_MAX: Final = 1024
_FADE_S: Final = 20.0
"""After so long without an observation, a fading mean keeps a third of its distance from what was assumed."""
_FADING_WEIGHT: Final = 0.2
_MEASURABLE_S: Final = 1e-5
"""Shorter times say nothing about a prediction."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a placement.

    Attributes:
        latency_s: from placement to the first token, at the router.
        raw_tokens_per_image: visual tokens before compression, on average over the request's images.
        block_bytes: of a block over all layers.
        block_tokens: of a block.
    """

    latency_s: float
    raw_tokens_per_image: float
    block_bytes: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Miss:
    """One part of a prediction beside what was observed, in seconds."""

    part: str
    predicted_s: float
    actual_s: float

    @property
    def relative_error(self) -> float:
        """Distance over what was observed."""
        return abs(self.predicted_s - self.actual_s) / self.actual_s


class Fading:
    """A mean of recent observations that goes back to what was assumed at first while there are none.

    The first transfer between two workers opens their link and takes many times what later ones do: one observation
    raises the mean to twice its value at most.

    Args:
        assumed: the value without observations; above 0.
        clock: monotonic, in seconds.
    """

    def __init__(self, assumed: float, clock: Callable[[], float]) -> None:
        self._assumed = assumed
        self._clock = clock
        self._value = assumed
        self._at_s = clock()

    @property
    def value(self) -> float:
        """The mean now."""
        age = (self._clock() - self._at_s) / _FADE_S
        return self._assumed + (self._value - self._assumed) * math.exp(-age)

    def add(self, observed: float) -> None:
        """Take in an observation."""
        value = self.value
        limit = value / _FADING_WEIGHT + value
        self._value = value + _FADING_WEIGHT * (min(observed, limit) - value)
        self._at_s = self._clock()


class CostBook:
    """Rates for placement: curves of prefill and encoding fitted to reports, links and tiers as workers measure them.

    Args:
        config: what is assumed before anything was observed.
        clock: monotonic, in seconds.
    """

    def __init__(self, config: RouterConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._everyone = CurveFit()
        self._fits: dict[str, CurveFit] = {}
        self._curves: dict[str, PrefillCurve] = {}
        self._encode: dict[str, Average] = {}
        first = Overheads()
        # What fetching takes is not learnt while nothing is fetched, so a bad start must not be believed for ever.
        self._restore, self._pull = Fading(first.restore_s, clock), Fading(first.pull_s, clock)
        self._overheads = {name: Average() for name in ("local", "remote")}
        self._rates: Rates | None = None
        self._read_at = float("-inf")
        self._prior = PrefillCurve()
        self._tiers: dict[tuple[str, str], float] = {}
        self._links: dict[tuple[str, str], float] = {}

    def rates(self, stats: Mapping[str, WorkerStats]) -> Rates:
        """The speeds as they are known now.

        Args:
            stats: the latest record of every worker.
        """
        now = self._clock()
        if now >= self._read_at + _REFRESH_S:
            self._read_at, self._rates = now, None
            self._read(stats)
        if self._rates is None:
            curve = self._everyone.curve(self._prior)
            self._rates = Rates(
                curves=dict(self._curves),
                curve=curve,
                encode_token_s={name: average.value for name, average in self._encode.items()},
                encode_default_s=self._config.image_cost_tokens * curve.token_s,
                tiers=self._tiers,
                links=self._links,
                overheads=self._overhead(),
            )
        return self._rates

    def learn(self, decision: RouteDecision, report: PrefillReport, outcome: Outcome) -> list[Miss]:
        """Take in how a placement went.

        Returns:
            Each part that was both predicted and observed.
        """
        worker = decision.prefill_worker or decision.decode_worker
        encoded = report.images - report.images_cached
        prefill_s, encode_s, fetch_s = report.prefill_ms / 1e3, report.encode_ms / 1e3, report.fetch_ms / 1e3
        prediction = decision.prediction
        if worker not in self._fits and len(self._fits) >= _WORKERS_MAX:
            self._forget(next(iter(self._fits)))
        fit = self._fits.setdefault(worker, CurveFit())
        for each in (fit, self._everyone):
            each.observe(report.cached_tokens, report.computed_tokens, prefill_s)
        self._curves[worker] = fit.curve(self._everyone.curve(self._prior))
        if encoded and outcome.raw_tokens_per_image and encode_s > _MEASURABLE_S:
            self._encode.setdefault(worker, Average()).add(encode_s / (encoded * outcome.raw_tokens_per_image))
        if prediction is not None:
            self._learn_overheads(decision, prediction, report, outcome, fetch_s)
            if prediction.idle:
                busy_s = fetch_s + encode_s + prefill_s + report.transfer_exposed_ms / 1e3
                kind = "local" if decision.prefill_worker is None else "remote"
                self._overheads[kind].add(max(0.0, outcome.latency_s - busy_s))
        self._rates = None
        return [] if prediction is None else _misses(prediction, report, outcome)

    def _learn_overheads(
        self,
        decision: RouteDecision,
        prediction: RoutePrediction,
        report: PrefillReport,
        outcome: Outcome,
        fetch_s: float,
    ) -> None:
        """What fetching took beyond its bytes, where it was of one kind only."""
        worker = decision.prefill_worker or decision.decode_worker
        rates = self._rates or Rates()
        if report.pulled_tokens and not report.restored_tokens and decision.pull_from is not None:
            nbytes = report.pulled_tokens // outcome.block_tokens * outcome.block_bytes
            self._pull.add(max(0.0, fetch_s - rates.send_s(decision.pull_from, worker, nbytes)))
        elif report.restored_tokens and Way.PULL not in prediction.ways and Way.PULL_IMAGE not in prediction.ways:
            read_s = prediction.fetch_s - rates.overheads.restore_s if Way.RESTORE in prediction.ways else 0.0
            self._restore.add(max(0.0, fetch_s - max(0.0, read_s)))

    def _overhead(self) -> Overheads:
        first = Overheads()
        local, remote = self._overheads["local"], self._overheads["remote"]
        base_s = local.value if local.samples else first.base_s
        return Overheads(
            base_s=base_s,
            restore_s=self._restore.value,
            pull_s=self._pull.value,
            handoff_s=max(0.0, remote.value - base_s) if remote.samples else first.handoff_s,
        )

    def _read(self, stats: Mapping[str, WorkerStats]) -> None:
        self._tiers = {
            (name, tier): rate
            for name, record in stats.items()
            for tier, rate in (
                (Tier.HOST.name.lower(), record.tier_host_bytes_per_s),
                (Tier.DISK.name.lower(), record.tier_disk_bytes_per_s),
            )
            if rate > 0
        }
        self._links = {
            (name, target): rate
            for name, record in stats.items()
            for target, rate in record.link_bytes_per_s
            if rate > 0
        }
        # What a worker has measured itself is better than a guess, until it has reported a prefill to this router.
        told = {
            name: 1.0 / record.prefill_tokens_per_s for name, record in stats.items() if record.prefill_tokens_per_s
        }
        if told:
            self._prior = PrefillCurve(token_s=statistics.median(told.values()))
        for name, token_s in told.items():
            if name not in self._fits:
                self._curves[name] = PrefillCurve(token_s=token_s)

    def _forget(self, worker: str) -> None:
        for held in (self._fits, self._curves, self._encode):
            held.pop(worker, None)


def _misses(prediction: RoutePrediction, report: PrefillReport, outcome: Outcome) -> list[Miss]:
    parts = (
        Miss("fetch", prediction.fetch_s, report.fetch_ms / 1e3 if prediction.fetch_s else 0.0),
        Miss("encode", prediction.encode_s, report.encode_ms / 1e3),
        Miss("prefill", prediction.prefill_s, report.prefill_ms / 1e3),
        Miss("transfer", prediction.transfer_s, report.transfer_exposed_ms / 1e3),
        Miss("first_token", prediction.total_s, outcome.latency_s),
    )
    return [part for part in parts if part.actual_s > _MEASURABLE_S]
