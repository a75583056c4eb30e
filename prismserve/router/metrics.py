"""Prometheus metrics of a router: base names as vLLM's, prefix ``prismserve:``, own registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from prismserve.core.types import WorkerState
from prismserve.kv_transfer.latency import Average

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client import Metric

    from prismserve.core.types import RouteDecision
    from prismserve.router.estimates import Miss
    from prismserve.router.sessions import WorkerSession
    from prismserve.router.usage import Usage

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
_PREFIX: Final = "prismserve:"
_TTFT_S: Final = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_ITL_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_RATIO: Final = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
_E2E_S: Final = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)

# WorkerStats field -> (metric, help); all are gauges of a worker's own counts, labelled by worker and role.
_WORKER_GAUGES: Final = {
    "running": ("num_requests_running", "Requests being generated at a worker"),
    "waiting": ("num_requests_waiting", "Requests queued at a worker"),
    "kv_blocks_total": ("kv_blocks", "KV blocks of a worker"),
    "kv_blocks_used": ("kv_blocks_used", "KV blocks held by requests"),
    "kv_blocks_cached": ("kv_blocks_cached", "KV blocks kept for reuse"),
    "prefix_query_tokens": ("prefix_cache_queries", "Tokens looked up in the prefix cache"),
    "prefix_hit_tokens": ("prefix_cache_hits", "Tokens found in the prefix cache"),
    "image_queries": ("mm_cache_queries", "Images looked up in the embedding cache"),
    "image_hits": ("mm_cache_hits", "Images found in the embedding cache"),
    "encoded_images": ("encoded_images", "Images encoded"),
    "derived_images": ("derived_images", "Images derived from the same image under a larger visual budget"),
    "prefill_tokens": ("prefill_tokens", "Tokens prefilled"),
    "decode_tokens": ("decode_tokens", "Tokens decoded"),
    "preemptions": ("num_preemptions", "Requests preempted"),
    "transfers": ("kv_transfers", "KV transfers completed"),
    "transfer_bytes": ("kv_transfer_bytes", "Bytes sent as KV, encoded"),
    "transfer_raw_bytes": ("kv_transfer_raw_bytes", "The same KV without codec, in bytes"),
    "transfer_seconds": ("kv_transfer_seconds", "Time spent sending KV"),
    "transfer_failures": ("kv_transfer_failures", "KV transfers that failed"),
    "tier_host_bytes_per_s": ("tier_host_bytes_per_second", "Measured rate of reading the host memory tier"),
    "tier_disk_bytes_per_s": ("tier_disk_bytes_per_second", "Measured rate of reading the file tier"),
    "prefill_tokens_per_s": ("prefill_tokens_per_second", "Recent prefill speed"),
    "tier_host_blocks": ("tier_host_blocks", "KV blocks in the host memory tier"),
    "tier_disk_blocks": ("tier_disk_blocks", "KV blocks in the file tier"),
    "tier_restored_images": ("tier_restored_images", "Images restored from tiers instead of encoded"),
    "tier_restored_tokens": ("tier_restored_tokens", "Tokens restored from tiers instead of prefilled"),
    "tier_corrupt_blocks": ("tier_corrupt_blocks", "KV blocks of tiers that failed their checksum"),
    "tier_errors": ("tier_errors", "Reads and writes of the file tier that failed"),
    "step_ms": ("step_milliseconds", "Recent duration of an engine step"),
}


class _WorkerCollector(Collector):
    """Reads the workers' latest statistics when scraped."""

    def __init__(self, sessions: Callable[[], list[WorkerSession]], model: str) -> None:
        self._sessions = sessions
        self._model = model

    def collect(self) -> Iterable[Metric]:
        """One gauge family per statistic, one sample per worker."""
        sessions = self._sessions()
        labels = ["model_name", "worker", "role"]
        for field, (name, text) in _WORKER_GAUGES.items():
            family = GaugeMetricFamily(f"{_PREFIX}{name}", text, labels=labels)
            for s in sessions:
                family.add_metric([self._model, s.info.worker_id, s.info.role.value], getattr(s.stats, field))
            yield family
        usage = GaugeMetricFamily(
            f"{_PREFIX}kv_cache_usage_perc", "KV blocks held by requests, 1 is all", labels=labels
        )
        for s in sessions:
            share = s.stats.kv_blocks_used / s.stats.kv_blocks_total if s.stats.kv_blocks_total else 0.0
            usage.add_metric([self._model, s.info.worker_id, s.info.role.value], share)
        yield usage
        yield from _up(sessions, self._model)

    def describe(self) -> Iterator[Metric]:
        """Nothing: the families are known only when workers are."""
        return iter(())


def _up(sessions: list[WorkerSession], model: str) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        f"{_PREFIX}worker_ready", "1 while a worker takes requests", labels=["model_name", "worker", "role"]
    )
    for s in sessions:
        family.add_metric([model, s.info.worker_id, s.info.role.value], float(s.state is WorkerState.READY))
    yield family


class RouterMetrics:
    """Everything a router counts.

    Args:
        model: value of the label ``model_name``.
        sessions: the sessions whose statistics are exported.
        running: requests in progress in this router.

    Attributes:
        registry: what :meth:`render` shows.
    """

    def __init__(self, model: str, sessions: Callable[[], list[WorkerSession]], running: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token", _TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens of a request", _ITL_S)
        self._tpot = self._histogram("request_time_per_output_token_seconds", "Mean of a request after TTFT", _ITL_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token", _E2E_S)
        self._queue = self._histogram("request_queue_time_seconds", "TTFT without encoding, prefill, transfer", _TTFT_S)
        self._exposed = self._histogram(
            "kv_transfer_exposed_seconds", "From the first token until the KV is verified at the decode worker", _ITL_S
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens served, after compression")
        self._cached = self._counter("prompt_tokens_cached", "Prompt tokens that were not prefilled again")
        self._generated = self._counter("generation_tokens", "Tokens generated")
        self._success = self._counter("request_success", "Requests finished", "finished_reason")
        self._failed = self._counter("request_failure", "Requests refused or failed", "kind")
        self._retries = self._counter("request_retries", "Further placements of requests")
        self._routes = self._counter("route_decisions", "Placements", "reason")
        self._ways = self._counter("route_ways", "How parts of placed prompts come to their workers", "way")
        self._predictions = Histogram(
            f"{_PREFIX}prediction_ratio",
            "Predicted over observed time of a part of a request, by part",
            ["model_name", "part"],
            buckets=_RATIO,
            registry=self.registry,
        )
        self._recent_errors: dict[str, Average] = {}
        self._prediction_error = Gauge(
            f"{_PREFIX}prediction_error",
            "Recent mean of |predicted - observed| over observed, by part",
            ["model_name", "part"],
            registry=self.registry,
        )
        self._visual_before = self._counter("visual_tokens_before", "Visual tokens before compression")
        self._visual_after = self._counter("visual_tokens_after", "Visual tokens after compression")
        self._kv_before = self._counter("kv_bytes_before", "KV of prompts without compression, in bytes")
        self._kv_sent = self._counter("kv_bytes_sent", "KV sent between workers for requests, in bytes")
        active = Gauge(f"{_PREFIX}router_requests", "Requests in progress in this router", registry=self.registry)
        active.set_function(lambda: float(running()))
        self.registry.register(_WorkerCollector(sessions, model))

    def render(self) -> bytes:
        """The exposition in Prometheus' text format, version 0.0.4."""
        return generate_latest(self.registry)

    def routed(self, decision: RouteDecision) -> None:
        """One placement."""
        self._routes.labels(self._model, decision.reason).inc()
        for way in decision.prediction.ways if decision.prediction is not None else ():
            self._ways.labels(self._model, way).inc()

    def predicted(self, misses: Iterable[Miss]) -> None:
        """What was predicted for a request whose first token has come, beside what was observed."""
        for miss in misses:
            self._predictions.labels(self._model, miss.part).observe(miss.predicted_s / miss.actual_s)
            recent = self._recent_errors.setdefault(miss.part, Average())
            recent.add(miss.relative_error)
            self._prediction_error.labels(self._model, miss.part).set(recent.value)

    def retried(self) -> None:
        """One attempt failed."""
        self._retries.labels(self._model).inc()

    def failed(self, kind: str) -> None:
        """One request was refused or failed; ``kind`` is the error's class."""
        self._failed.labels(self._model, kind).inc()

    def first_token(self, ttft_s: float) -> None:
        """A request got its first token."""
        self._ttft.labels(self._model).observe(ttft_s)

    def next_tokens(self, each_s: float, tokens: int) -> None:
        """A request got further tokens, ``each_s`` seconds apart on average."""
        child = self._itl.labels(self._model)
        for _ in range(tokens):
            child.observe(each_s)

    def finished(self, reason: str, usage: Usage, e2e_s: float) -> None:
        """A request ended well."""
        model = self._model
        self._success.labels(model, reason).inc()
        self._e2e.labels(model).observe(e2e_s)
        self._queue.labels(model).observe(usage.queue_ms / 1e3)
        if usage.kv_bytes_sent:
            self._exposed.labels(model).observe(usage.transfer_exposed_ms / 1e3)
        if usage.completion_tokens > 1:
            self._tpot.labels(model).observe((e2e_s - usage.ttft_ms / 1e3) / (usage.completion_tokens - 1))
        self._prompt.labels(model).inc(usage.prompt_tokens)
        self._cached.labels(model).inc(usage.cached_tokens)
        self._generated.labels(model).inc(usage.completion_tokens)
        self._visual_before.labels(model).inc(usage.visual_tokens_before)
        self._visual_after.labels(model).inc(usage.visual_tokens_after)
        self._kv_before.labels(model).inc(usage.kv_bytes_before)
        self._kv_sent.labels(model).inc(usage.kv_bytes_sent)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{_PREFIX}{name}", text, ["model_name"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}{name}", text, ["model_name", *labels], registry=self.registry)
