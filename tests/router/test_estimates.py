"""Reports teach the router how fast its workers are, and what came of each prediction."""

from __future__ import annotations

import pytest

from prismserve.core.types import PrefillReport, RouteDecision, RoutePrediction, WorkerStats
from prismserve.kv_transfer.costs import Way
from prismserve.router.config import RouterConfig
from prismserve.router.estimates import CostBook, Fading, Outcome

BLOCK_BYTES = 1_000_000


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def book(clock=None):
    return CostBook(RouterConfig(), clock or Clock())


def outcome(latency_s=0.1, raw_tokens=200.0):
    return Outcome(latency_s, raw_tokens, BLOCK_BYTES, 16)


def decision(prefill="p", pull_from=None, **prediction):
    return RouteDecision("d", prefill, "why", pull_from, prediction=RoutePrediction(**prediction))


def report(**values):
    return PrefillReport(**{"worker_id": "p", "computed_tokens": 100, "prefill_ms": 50.0, **values})


def test_prefill_is_fitted_for_the_worker_that_did_it_and_assumed_of_others():
    learnt = book()
    for _ in range(50):
        learnt.learn(decision("p"), report(), outcome())
        learnt.learn(decision(None), report(prefill_ms=200.0), outcome())
    rates = learnt.rates({})
    assert rates.prefill_s("p", 0, 100) == pytest.approx(0.05, rel=0.02)
    assert rates.prefill_s("d", 0, 100) == pytest.approx(0.2, rel=0.02)
    assert 0.05 < rates.prefill_s("new", 0, 100) < 0.2


def test_encoding_is_learnt_by_visual_token():
    learnt = book()
    learnt.learn(decision(), report(images=3, images_cached=1, encode_ms=80.0), outcome(raw_tokens=200))
    assert learnt.rates({}).encode_s("p", 200) == pytest.approx(0.04)
    # Nothing was encoded: nothing is learnt.
    learnt.learn(decision(), report(images=1, images_cached=1, encode_ms=9.0), outcome())
    assert learnt.rates({}).encode_s("p", 200) == pytest.approx(0.04)


def test_rates_of_links_and_tiers_come_from_the_workers_own_records():
    clock = Clock()
    learnt = book(clock)
    stats = {
        "p": WorkerStats("p", tier_host_bytes_per_s=3e9, link_bytes_per_s=(("d", 2e9),), prefill_tokens_per_s=1000.0)
    }
    rates = learnt.rates(stats)
    assert rates.link("p", "d") == 2e9
    assert rates.tiers == {("p", "host"): 3e9}
    assert rates.prefill_s("p", 0, 100) == pytest.approx(0.1)
    assert learnt.rates({}).link("p", "d") == 2e9
    clock.now += 1.0
    assert learnt.rates({}).link("p", "d") == 1e9


def test_each_part_of_a_prediction_is_compared_with_the_report():
    predicted = decision(base_s=0.01, encode_s=0.02, prefill_s=0.04, transfer_s=0.01)
    misses = book().learn(predicted, report(images=1, encode_ms=40.0, transfer_exposed_ms=5.0), outcome(latency_s=0.16))
    errors = {miss.part: miss.relative_error for miss in misses}
    assert errors == pytest.approx({"encode": 0.5, "prefill": 0.2, "transfer": 1.0, "first_token": 0.5})


def test_what_pulling_takes_beside_its_bytes_is_learnt():
    clock = Clock()
    learnt = book(clock)
    pulled = decision(pull_from="q", ways=(Way.PULL, Way.RECOMPUTE))
    for _ in range(60):
        # 10 blocks of 1 MB at 1 GB/s are 10 ms of the 25.
        learnt.rates({"q": WorkerStats("q", link_bytes_per_s=(("p", 1e9),))})
        learnt.learn(pulled, report(pulled_tokens=160, fetch_ms=25.0), outcome())
    assert learnt.rates({}).overheads.pull_s == pytest.approx(0.015, rel=0.01)


def test_what_restoring_takes_beside_its_bytes_is_learnt():
    learnt = book()
    for _ in range(60):
        predicted_s = learnt.rates({}).overheads.restore_s + 0.01
        restored = decision(fetch_s=predicted_s, ways=(Way.RESTORE, Way.RECOMPUTE))
        learnt.learn(restored, report(restored_tokens=160, fetch_ms=14.0), outcome())
    assert learnt.rates({}).overheads.restore_s == pytest.approx(0.004, rel=0.01)


def test_one_slow_pull_is_not_believed_and_a_bad_time_is_forgotten():
    clock = Clock()
    fading = Fading(0.004, clock)
    fading.add(5.0)
    assert fading.value == pytest.approx(0.008)
    for _ in range(20):
        fading.add(5.0)
    assert fading.value > 1.0
    clock.now += 120.0
    assert fading.value == pytest.approx(0.004, abs=0.02)


def test_a_handoff_costs_what_it_adds_to_a_local_answer_and_only_idle_workers_tell():
    learnt = book()
    learnt.learn(decision(None, idle=True), report(prefill_ms=50.0), outcome(latency_s=0.052))
    learnt.learn(decision("p", idle=True), report(prefill_ms=50.0, transfer_exposed_ms=1.0), outcome(latency_s=0.058))
    learnt.learn(decision("p", idle=False), report(prefill_ms=50.0), outcome(latency_s=9.0))
    overheads = learnt.rates({}).overheads
    assert (overheads.base_s, overheads.handoff_s) == pytest.approx((0.002, 0.005))
