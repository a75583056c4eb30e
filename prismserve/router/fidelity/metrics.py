"""What the guard found, for Prometheus: bounded however many tenants and plans there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import Counter, Gauge, Histogram

from prismserve.router.fidelity.judge import CHAIN

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from prismserve.core.types import CompressionPlan
    from prismserve.router.fidelity.compare import Comparison

OTHER: Final = "other"
DEFAULT_TENANT: Final = "default"
_PREFIX: Final = "prismserve:fidelity_"
_TOKENS: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
_NATS: Final = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_LABELS: Final = ("model_name", "tenant", "method", "preset")

LabelSet = tuple[str, str, str]


class Labels:
    """Gives each combination of label values itself, and ``other`` to all beyond the first ``limit``."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[LabelSet] = set()

    def of(self, wanted: LabelSet) -> LabelSet:
        """The label values to use."""
        if wanted in self._known or len(self._known) < self._limit:
            self._known.add(wanted)
            return wanted
        return OTHER, OTHER, OTHER


def method_label(plan: CompressionPlan) -> str:
    """``visionzip``, ``fastv``, ``visionzip+fastv``; the codec's name where no visual token is reduced."""
    reducing = [spec.name for spec in (plan.visual, plan.prefill) if spec.name != "none"]
    return "+".join(reducing) or plan.wire.name


class FidelityMetrics:
    """Counters and histograms of one router.

    Args:
        registry: where they are registered.
        model: value of the label ``model_name``.
        label_sets_max: combinations of tenant, method and preset that are told apart.
    """

    def __init__(self, registry: CollectorRegistry, model: str, label_sets_max: int) -> None:
        self._model = model
        self._labels = Labels(label_sets_max)
        self._replays = Counter(
            f"{_PREFIX}replays",
            "Requests chosen for a replay, by what became of it",
            ["model_name", "outcome"],
            registry=registry,
        )
        self._compared = Counter(f"{_PREFIX}comparisons", "Answers compared", _LABELS, registry=registry)
        self._agreed = Counter(
            f"{_PREFIX}agreements", "Answers equal with and without compression", _LABELS, registry=registry
        )
        self._divergence = Histogram(
            f"{_PREFIX}first_divergence_tokens",
            "Index of the first token that differs",
            _LABELS,
            buckets=_TOKENS,
            registry=registry,
        )
        self._kl = Histogram(
            f"{_PREFIX}kl_nats",
            "Divergence of next-token distributions, mean over the shared prefix",
            _LABELS,
            buckets=_NATS,
            registry=registry,
        )
        self._held = Gauge(
            f"{_PREFIX}preset_held",
            "1 while a milder preset is served in its place",
            ["model_name", "preset"],
            registry=registry,
        )
        self._steps = Counter(
            f"{_PREFIX}preset_steps",
            "Times a preset stepped back or forth",
            ["model_name", "preset", "direction"],
            registry=registry,
        )
        for preset in CHAIN:
            self._held.labels(model, preset).set(0)

    def outcome(self, kind: str, count: int = 1) -> None:
        """Replays that ended: ``compared``, ``refused``, ``expired``, ``interrupted`` or ``failed``."""
        self._replays.labels(self._model, kind).inc(count)

    def compared(self, tenant: str, plan: CompressionPlan, preset: str, comparison: Comparison) -> None:
        """One comparison."""
        labels = (self._model, *self._labels.of((tenant or DEFAULT_TENANT, method_label(plan), preset)))
        self._compared.labels(*labels).inc()
        self._kl.labels(*labels).observe(comparison.kl_nats)
        if comparison.first_divergence is None:
            self._agreed.labels(*labels).inc()
        else:
            self._divergence.labels(*labels).observe(comparison.first_divergence)

    def stepped(self, preset: str, direction: str) -> None:
        """A preset went ``back`` or ``forth``."""
        self._steps.labels(self._model, preset, direction).inc()

    def held(self, preset: str, *, held: bool) -> None:
        """Whether a preset is replaced now."""
        self._held.labels(self._model, preset).set(float(held))
