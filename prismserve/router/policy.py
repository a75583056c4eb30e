"""Where a request goes: a pure function over plain data.

What compares workers is the predicted time to the first token, see :mod:`prismserve.kv_transfer.costs`: behind the
requests a worker already has, each taken for ``load_cost_tokens`` of prefill, then fetching, encoding and computing what
it lacks. Ties go to the smallest worker id, so that the same view always gives the same decision.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Final

from prismserve.core.errors import WorkerUnavailableError
from prismserve.core.types import Role, RouteDecision, RoutePrediction, WorkerState, WorkerStats
from prismserve.kv_transfer.costs import Holder, ImageNeed, PromptNeed, PromptPlan, Rates, Way, exposed_s, plan_prompt
from prismserve.kv_transfer.index.mirror import PrefixMatch
from prismserve.kv_transfer.latency import PrefillCurve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prismserve.core.types import WorkerInfo
    from prismserve.router.config import RouterConfig

DECODES: Final = (Role.DECODE, Role.MIXED)
_PREFILLS: Final = (Role.PREFILL, Role.MIXED)
_CANDIDATES: Final = 8
"""Workers that are compared in detail, the best by a rough measure."""
_HOLDERS: Final = 2
"""Peers that are considered to pull a prefix from: those with the longest."""
_NOTHING: Final = PrefixMatch()

DISAGGREGATED: Final = "disaggregated"
LOCAL_PREFIX: Final = "local: prefix cached at the decode worker"
LOCAL_SHORT: Final = "local: short prompt"
LOCAL_FASTER: Final = "local: predicted to be faster"
LOCAL_MIXED: Final = "local: mixed worker"
LOCAL_NO_PREFILL: Final = "local: no prefill worker"


@dataclass(frozen=True, slots=True)
class RequestView:
    """What placement must know of a request.

    Attributes:
        prompt_tokens: cache slots of the prompt, resumed tokens included.
        block_tokens: tokens per block.
        images: its images and videos, in order.
        block_bytes: exact bytes of a block over all layers.
        wire_bytes: of the whole prompt as its codec encodes it.
        harder_wire_bytes: the same under the codec it may be compressed harder with; None if it may not.
        layers: of the model.
    """

    prompt_tokens: int
    block_tokens: int
    images: tuple[ImageNeed, ...] = ()
    block_bytes: int = 0
    wire_bytes: int = 0
    harder_wire_bytes: int | None = None
    layers: int = 1

    @property
    def media_end_tokens(self) -> int:
        """Cache slots up to and including the last image; 0 without images."""
        return max((image.end_tokens for image in self.images), default=0)

    @property
    def need(self) -> PromptNeed:
        """The same as the cost model takes it."""
        return PromptNeed(self.prompt_tokens, self.block_tokens, self.block_bytes, self.images)


@dataclass(frozen=True, slots=True)
class CacheView:
    """What the mirror knows that helps this request.

    Attributes:
        exact: per worker, what it holds of the chain that prefill publishes.
        wire: per worker, what it holds of the chain that decode publishes.
        images: per image, the workers that hold its embeddings.
    """

    exact: Mapping[str, PrefixMatch] = field(default_factory=dict)
    wire: Mapping[str, PrefixMatch] = field(default_factory=dict)
    images: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class LoadView:
    """Load of the workers.

    Attributes:
        stats: the latest record of each worker.
        in_flight: requests this router has at each worker; fresher than ``stats``, blind to other routers.
    """

    stats: Mapping[str, WorkerStats] = field(default_factory=dict)
    in_flight: Mapping[str, int] = field(default_factory=dict)

    def requests(self, worker_id: str) -> int:
        """Requests at a worker, as far as known."""
        stats = self.stats.get(worker_id)
        reported = stats.waiting + stats.running if stats else 0
        return max(reported, self.in_flight.get(worker_id, 0))

    def pressure(self, worker_id: str) -> float:
        """Share of a worker's KV blocks that requests hold; cached blocks can be evicted and do not count."""
        stats = self.stats.get(worker_id)
        if stats is None or not stats.kv_blocks_total:
            return 0.0
        return stats.kv_blocks_used / stats.kv_blocks_total


def cached_tokens(view: RequestView, blocks: int) -> int:
    """Prompt tokens that ``blocks`` cached blocks spare; the last token is always computed, to sample from it."""
    return view.need.cached(blocks)


def default_rates(config: RouterConfig) -> Rates:
    """The speeds that are assumed while nothing has been measured."""
    curve = PrefillCurve()
    return Rates(curve=curve, encode_default_s=config.image_cost_tokens * curve.token_s)


def place(
    view: RequestView,
    workers: Sequence[WorkerInfo],
    cache: CacheView,
    load: LoadView,
    config: RouterConfig,
    rates: Rates | None = None,
) -> RouteDecision:
    """Choose a decode worker and, unless it prefills by itself, a prefill worker.

    Args:
        view: the request.
        workers: candidates: connected, of one model and layout. Those not READY only serve as holders.
        cache: what the mirror knows.
        load: how busy the workers are.
        config: weights and thresholds.
        rates: measured speeds; None assumes the same of every worker.

    Raises:
        WorkerUnavailableError: no worker that decodes is ready.
    """
    ready = [w for w in workers if w.state is WorkerState.READY]
    decoders = [w for w in ready if w.role in DECODES]
    if not decoders:
        message = "no decode worker is ready; try again shortly"
        raise WorkerUnavailableError(message)
    scene = _Scene(view, workers, cache, load, config, default_rates(config) if rates is None else rates)
    # Where prefill workers do the work, what a decode worker could pull is no reason to decode there.
    decode = scene.decoder(decoders, pulls=not any(w.role is Role.PREFILL for w in ready))
    prefillers = [w for w in ready if w.role in _PREFILLS and w is not decode and _linked(w, decode)]
    reason = _local_reason(view, decode, prefillers, cache, config)
    by_cost = config.local_prefill == "cost"
    local = scene.local(decode, reason or LOCAL_FASTER) if reason is not None or by_cost else None
    if reason is not None and local is not None:
        return local
    remote = scene.remote(decode, prefillers)
    if local is None:
        return remote
    local_s, remote_s = scene.total_s(local) + scene.stall_s(decode, local), scene.total_s(remote)
    chosen, other_s = (local, remote_s) if local_s < remote_s else (remote, local_s)
    return replace(chosen, prediction=replace(_prediction(chosen), other_s=other_s))


@dataclass(frozen=True, slots=True)
class _Scene:
    """Everything one decision looks at."""

    view: RequestView
    workers: Sequence[WorkerInfo]
    cache: CacheView
    load: LoadView
    config: RouterConfig
    rates: Rates

    def decoder(self, decoders: Sequence[WorkerInfo], *, pulls: bool) -> WorkerInfo:
        """Where the answer is written: the worker that could have the prompt ready soonest, unless its pool is full.

        A prefill worker may do that for it; but where least is missing, least must be computed or sent.
        """

        def full(worker: WorkerInfo) -> bool:
            return self.load.pressure(worker.worker_id) > self.config.kv_pressure

        def rough(worker: WorkerInfo) -> tuple[bool, float, str]:
            return full(worker), self.rough_s(worker, self.cache.wire), worker.worker_id

        def exact(worker: WorkerInfo) -> tuple[bool, float, str]:
            name = worker.worker_id
            return full(worker), self.queue_s(name) + self.plan(worker, self.cache.wire, pulls=pulls).total_s, name

        return min(heapq.nsmallest(_CANDIDATES, decoders, key=rough), key=exact)

    def rough_s(self, worker: WorkerInfo, held: Mapping[str, PrefixMatch]) -> float:
        """The queue and what would have to be computed; cheap, and enough to leave the worst out."""
        name = worker.worker_id
        cached = cached_tokens(self.view, held.get(name, _NOTHING).blocks)
        return self.queue_s(name) + self.rates.prefill_s(name, cached, self.view.prompt_tokens - cached)

    def queue_s(self, name: str) -> float:
        """Predicted wait behind the requests a worker has."""
        requests = self.load.requests(name)
        return requests * self.rates.prefill_s(name, 0, self.config.load_cost_tokens) if requests else 0.0

    def plan(self, worker: WorkerInfo, held: Mapping[str, PrefixMatch], *, pulls: bool = True) -> PromptPlan:
        """How this worker would get the prompt ready; without ``pulls`` by itself."""
        name = worker.worker_id
        near = {w.worker_id for w in self.workers if w is worker or (pulls and _linked(w, worker))}
        peers = (w for w in near if w != name and w in held)
        longest = sorted(peers, key=lambda w: (-held[w].blocks, -held[w].ready_blocks, w))
        images = self.cache.images or ((),) * len(self.view.images)
        return plan_prompt(
            self.view.need,
            name,
            held.get(name, _NOTHING),
            [Holder(w, held[w]) for w in islice(longest, _HOLDERS)],
            [sorted(near.intersection(holders)) for holders in images],
            self.rates,
            pull_blocks_min=self.config.pull_blocks_min,
        )

    def local(self, decode: WorkerInfo, reason: str) -> RouteDecision:
        """Prefill and decode at one worker."""
        plan = self.plan(decode, self.cache.wire)
        queue_s, idle = self.queue_s(decode.worker_id), not self.load.requests(decode.worker_id)
        prediction = RoutePrediction(
            base_s=self.rates.overheads.base_s,
            queue_s=queue_s,
            fetch_s=plan.fetch_s,
            encode_s=plan.encode_s,
            prefill_s=plan.prefill_s,
            ways=plan.ways,
            idle=idle,
        )
        return _decision(decode.worker_id, None, reason, plan, prediction)

    def remote(self, decode: WorkerInfo, prefillers: Sequence[WorkerInfo]) -> RouteDecision:
        """Prefill at the best of ``prefillers``, decode at ``decode``."""

        def rough(worker: WorkerInfo) -> tuple[bool, float, str]:
            # A worker with a mixed role is needed for decoding; a dedicated one goes first.
            return worker.role is Role.MIXED, self.rough_s(worker, self.cache.exact), worker.worker_id

        best = heapq.nsmallest(_CANDIDATES, prefillers, key=rough)
        plans = {w.worker_id: self.plan(w, self.cache.exact) for w in best}
        prefill = min(
            best,
            key=lambda w: (
                w.role is Role.MIXED,
                self.queue_s(w.worker_id) + plans[w.worker_id].total_s,
                w.worker_id,
            ),
        )
        plan = plans[prefill.worker_id]
        source, target = prefill.worker_id, decode.worker_id
        compute_s = plan.prefill_s
        transfer_s = self.transfer_s(source, target, self.view.wire_bytes, compute_s)
        harder = False
        if self.view.harder_wire_bytes is not None:
            harder_s = self.transfer_s(source, target, self.view.harder_wire_bytes, compute_s)
            whole_s = self.queue_s(source) + plan.total_s + transfer_s
            harder = transfer_s - harder_s >= self.config.harder_gain_min * whole_s > 0
            transfer_s = harder_s if harder else transfer_s
        prediction = RoutePrediction(
            base_s=self.rates.overheads.base_s,
            queue_s=self.queue_s(source),
            fetch_s=plan.fetch_s,
            encode_s=plan.encode_s,
            prefill_s=plan.prefill_s,
            transfer_s=transfer_s,
            handoff_s=self.rates.overheads.handoff_s,
            ways=(*plan.ways, Way.COMPRESS_HARDER) if harder else plan.ways,
            idle=not self.load.requests(source) and not self.load.requests(target),
        )
        decision = _decision(target, source, DISAGGREGATED, plan, prediction)
        return replace(decision, compress_harder=harder)

    def transfer_s(self, source: str, target: str, wire_bytes: int, compute_s: float) -> float:
        """Time until the last of the prompt's KV has arrived, after its prefill; what the target holds is not sent."""
        held = cached_tokens(self.view, self.cache.wire.get(target, _NOTHING).ready_blocks)
        nbytes = round(wire_bytes * (1 - held / self.view.prompt_tokens))
        return exposed_s(nbytes, self.view.layers, compute_s, self.rates.link(source, target))

    def stall_s(self, decode: WorkerInfo, local: RouteDecision) -> float:
        """What a local prefill costs the answers that the decode worker is writing."""
        stats, prediction = self.load.stats.get(decode.worker_id), _prediction(local)
        running = max(stats.running if stats else 0, self.load.in_flight.get(decode.worker_id, 0))
        return self.config.stall_cost * running * (prediction.encode_s + prediction.prefill_s)

    @staticmethod
    def total_s(decision: RouteDecision) -> float:
        """Predicted time to the first token."""
        return _prediction(decision).total_s


def _decision(
    decode: str, prefill: str | None, reason: str, plan: PromptPlan, prediction: RoutePrediction
) -> RouteDecision:
    return RouteDecision(
        decode_worker=decode,
        prefill_worker=prefill,
        reason=reason,
        pull_from=plan.pull_from,
        pull_blocks=plan.pull_blocks,
        embedding_holders=plan.image_sources,
        # Without a faster way the worker decides: it knows its tiers better than the index does.
        restore=plan.restore or plan.pull_from is None,
        prediction=prediction,
    )


def _prediction(decision: RouteDecision) -> RoutePrediction:
    return decision.prediction or RoutePrediction()


def _linked(one: WorkerInfo, other: WorkerInfo) -> bool:
    return bool(set(one.transports) & set(other.transports))


def _local_reason(
    view: RequestView, decode: WorkerInfo, prefillers: Sequence[WorkerInfo], cache: CacheView, config: RouterConfig
) -> str | None:
    """Why the decode worker prefills by itself whatever that takes; None if it need not."""
    if not prefillers:
        return LOCAL_MIXED if decode.role is Role.MIXED else LOCAL_NO_PREFILL
    if decode.role is Role.MIXED and all(w.role is Role.MIXED for w in prefillers):
        return LOCAL_MIXED
    cached = cached_tokens(view, cache.wire.get(decode.worker_id, _NOTHING).blocks)
    # Encoding an image stalls every stream of a decode worker, however few tokens remain of it.
    if view.prompt_tokens - cached > config.local_prefill_tokens_max or cached < view.media_end_tokens:
        return None
    return LOCAL_PREFIX if cached else LOCAL_SHORT
