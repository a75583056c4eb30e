"""Where a request goes: a pure function over plain data.

One cost, in prefill-token equivalents, compares workers: tokens still to be computed there, plus
``load_cost_tokens`` per request it already has, plus ``image_cost_tokens`` per image it would have to encode. Ties go
to the smallest worker id, so that the same view always gives the same decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from prismserve.core.errors import WorkerUnavailableError
from prismserve.core.types import Role, RouteDecision, WorkerState, WorkerStats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prismserve.core.types import WorkerInfo
    from prismserve.router.config import RouterConfig

DECODES: Final = (Role.DECODE, Role.MIXED)
_PREFILLS: Final = (Role.PREFILL, Role.MIXED)

DISAGGREGATED: Final = "disaggregated"
LOCAL_PREFIX: Final = "local: prefix cached at the decode worker"
LOCAL_SHORT: Final = "local: short prompt"
LOCAL_MIXED: Final = "local: mixed worker"
LOCAL_NO_PREFILL: Final = "local: no prefill worker"


@dataclass(frozen=True, slots=True)
class RequestView:
    """What placement must know of a request.

    Attributes:
        prompt_tokens: cache slots of the prompt, resumed tokens included.
        media_end_tokens: cache slots up to and including the last image; 0 without images.
        block_tokens: tokens per block.
        images: how many images.
    """

    prompt_tokens: int
    media_end_tokens: int
    block_tokens: int
    images: int


@dataclass(frozen=True, slots=True)
class CacheView:
    """What the mirror knows that helps this request.

    Attributes:
        exact: per worker, leading blocks it holds of the chain that prefill publishes.
        wire: per worker, leading blocks it holds of the chain that decode publishes.
        images: per image, the workers that hold its embeddings.
    """

    exact: Mapping[str, int] = field(default_factory=dict)
    wire: Mapping[str, int] = field(default_factory=dict)
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
    return max(0, min(blocks * view.block_tokens, view.prompt_tokens - 1))


def place(
    view: RequestView, workers: Sequence[WorkerInfo], cache: CacheView, load: LoadView, config: RouterConfig
) -> RouteDecision:
    """Choose a decode worker and, unless it prefills by itself, a prefill worker.

    Args:
        view: the request.
        workers: candidates: connected, of one model and layout. Those not READY only serve as holders.
        cache: what the mirror knows.
        load: how busy the workers are.
        config: weights and thresholds.

    Raises:
        WorkerUnavailableError: no worker that decodes is ready.
    """
    ready = [w for w in workers if w.state is WorkerState.READY]
    decoders = [w for w in ready if w.role in DECODES]
    if not decoders:
        message = "no decode worker is ready; try again shortly"
        raise WorkerUnavailableError(message)
    decode = min(decoders, key=lambda w: (_decode_cost(view, w, cache, load, config), w.worker_id))
    prefillers = [w for w in ready if w.role in _PREFILLS and w is not decode and _linked(w, decode)]
    reason = _local_reason(view, decode, prefillers, cache, config)
    if reason is not None:
        pull_from, pull_blocks = _pull(cache.wire, decode, workers, config)
        holders = _embedding_holders(cache, decode, workers)
        return RouteDecision(decode.worker_id, None, reason, pull_from, pull_blocks, holders)
    prefill = min(prefillers, key=lambda w: (_prefill_cost(view, w, cache, load, config), w.worker_id))
    pull_from, pull_blocks = _pull(cache.exact, prefill, workers, config)
    holders = _embedding_holders(cache, prefill, workers)
    return RouteDecision(decode.worker_id, prefill.worker_id, DISAGGREGATED, pull_from, pull_blocks, holders)


def _decode_cost(
    view: RequestView, worker: WorkerInfo, cache: CacheView, load: LoadView, config: RouterConfig
) -> tuple[bool, int]:
    missing = view.prompt_tokens - cached_tokens(view, cache.wire.get(worker.worker_id, 0))
    full = load.pressure(worker.worker_id) > config.kv_pressure
    return full, load.requests(worker.worker_id) * config.load_cost_tokens + missing


def _prefill_cost(
    view: RequestView, worker: WorkerInfo, cache: CacheView, load: LoadView, config: RouterConfig
) -> tuple[bool, int]:
    cached = cached_tokens(view, cache.exact.get(worker.worker_id, 0))
    to_encode = 0
    if cached < view.media_end_tokens:
        to_encode = view.images - sum(worker.worker_id in holders for holders in cache.images)
    compute = view.prompt_tokens - cached + max(0, to_encode) * config.image_cost_tokens
    # A worker with a mixed role is needed for decoding; a dedicated one goes first.
    return worker.role is Role.MIXED, load.requests(worker.worker_id) * config.load_cost_tokens + compute


def _linked(one: WorkerInfo, other: WorkerInfo) -> bool:
    return bool(set(one.transports) & set(other.transports))


def _local_reason(
    view: RequestView, decode: WorkerInfo, prefillers: Sequence[WorkerInfo], cache: CacheView, config: RouterConfig
) -> str | None:
    if not prefillers:
        return LOCAL_MIXED if decode.role is Role.MIXED else LOCAL_NO_PREFILL
    if decode.role is Role.MIXED and all(w.role is Role.MIXED for w in prefillers):
        return LOCAL_MIXED
    cached = cached_tokens(view, cache.wire.get(decode.worker_id, 0))
    # Encoding an image stalls every stream of a decode worker, however few tokens remain of it.
    if view.prompt_tokens - cached > config.local_prefill_tokens_max or cached < view.media_end_tokens:
        return None
    return LOCAL_PREFIX if cached else LOCAL_SHORT


def _pull(
    held: Mapping[str, int], target: WorkerInfo, workers: Sequence[WorkerInfo], config: RouterConfig
) -> tuple[str | None, int]:
    own = held.get(target.worker_id, 0)
    sources = [w for w in workers if w is not target and _linked(w, target) and held.get(w.worker_id, 0) > own]
    if not sources:
        return None, 0
    best = max(sources, key=lambda w: (held[w.worker_id], w.worker_id))
    blocks = held[best.worker_id]
    return (best.worker_id, blocks) if blocks - own >= config.pull_blocks_min else (None, 0)


def _embedding_holders(cache: CacheView, target: WorkerInfo, workers: Sequence[WorkerInfo]) -> tuple[str, ...]:
    reachable = {w.worker_id for w in workers if w is not target and _linked(w, target)}
    chosen = []
    for holders in cache.images:
        others = [] if target.worker_id in holders else sorted(reachable.intersection(holders))
        chosen.append(others[0] if others else "")
    return tuple(chosen)
