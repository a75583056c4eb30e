"""The guard's metrics: per tenant, method and preset, and bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from prismserve.compression import presets
from prismserve.router.fidelity.compare import Comparison
from prismserve.router.fidelity.metrics import FidelityMetrics, method_label

TURBO = presets.resolve("turbo", "off")


def lines(registry):
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_agreement_divergence_and_kl_are_told_by_tenant_model_method_and_preset():
    registry = CollectorRegistry()
    metrics = FidelityMetrics(registry, "m", 8)
    metrics.compared("", TURBO, "turbo", Comparison(None, 0.002))
    metrics.compared("", TURBO, "turbo", Comparison(3, 0.5))
    labels = '{method="prism",model_name="m",preset="turbo",tenant="default"}'
    found = lines(registry)
    assert f"prismserve:fidelity_comparisons_total{labels} 2.0" in found
    assert f"prismserve:fidelity_agreements_total{labels} 1.0" in found
    assert f"prismserve:fidelity_first_divergence_tokens_sum{labels} 3.0" in found
    assert f"prismserve:fidelity_kl_nats_count{labels} 2.0" in found


def test_no_number_of_tenants_makes_more_than_the_limit_of_series():
    registry = CollectorRegistry()
    metrics = FidelityMetrics(registry, "m", 3)
    for number in range(100):
        metrics.compared(f"tenant-{number}", TURBO, "turbo", Comparison(None, 0.0))
    series = [line for line in lines(registry) if line.startswith("prismserve:fidelity_comparisons_total")]
    assert len(series) == 4
    assert any('tenant="other"' in line and line.endswith(" 97.0") for line in series)


def test_a_plan_is_named_by_what_reduces_visual_tokens():
    names = {"visionzip": "visionzip", "fastv": "fastv", "off": "none"}
    for asked, name in names.items():
        assert method_label(presets.resolve(asked, "off")) == name
    both = {"visual": {"method": "prism", "keep": 49}, "prefill": "fastv", "wire": "int8"}
    assert method_label(presets.resolve(both, "off")) == "prism+fastv"
    assert method_label(presets.resolve({"wire": "int8"}, "off")) == "int8"
