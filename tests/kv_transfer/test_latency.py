"""The curve of prefill finds the coefficients it was shown, and assumes little where it was shown little."""

from __future__ import annotations

import random

import pytest

from prismserve.kv_transfer.latency import Average, CurveFit, PrefillCurve

TRUE = PrefillCurve(fixed_s=0.004, token_s=2e-4, pair_s=3e-8)


def test_the_time_of_a_prefill_by_hand():
    # 0.004 + 100 * 2e-4 + 3e-8 * 100 * (1000 + 50)
    assert TRUE.seconds(1000, 100) == pytest.approx(0.004 + 0.02 + 0.00315)
    assert TRUE.seconds(1000, 0) == 0.0


def test_noisy_observations_give_the_curve_back():
    drawn = random.Random(1)
    fit = CurveFit()
    for _ in range(200):
        cached, tokens = drawn.randrange(4000), drawn.randrange(16, 2000)
        fit.observe(cached, tokens, TRUE.seconds(cached, tokens) * drawn.uniform(0.97, 1.03))
    found = fit.curve()
    for cached, tokens in ((0, 32), (0, 1000), (3000, 64), (3000, 1500)):
        assert found.seconds(cached, tokens) == pytest.approx(TRUE.seconds(cached, tokens), rel=0.05)


def test_one_length_is_predicted_well_and_a_shorter_one_not_as_more():
    fit = CurveFit()
    for _ in range(20):
        fit.observe(0, 220, 0.05)
    assert fit.curve().seconds(0, 220) == pytest.approx(0.05, rel=0.01)
    assert 0 < fit.curve().seconds(0, 110) < 0.05


def test_a_worker_that_becomes_slower_is_noticed():
    fit = CurveFit()
    for speed in [1.0] * 100 + [3.0] * 100:
        for tokens in (50, 500):
            fit.observe(0, tokens, speed * TRUE.seconds(0, tokens))
    assert fit.curve().seconds(0, 500) == pytest.approx(3 * TRUE.seconds(0, 500), rel=0.1)


def test_without_observations_the_prior_is_assumed():
    assert CurveFit().curve(TRUE) == TRUE
    useless = CurveFit()
    useless.observe(100, 0, 1.0)
    useless.observe(0, 100, 0.0)
    assert useless.curve(TRUE) == TRUE


def test_no_coefficient_is_negative():
    fit = CurveFit()
    for tokens, seconds in ((10, 0.1), (100, 0.01), (1000, 0.001)):
        fit.observe(0, tokens, seconds)
    found = fit.curve()
    assert min(found.fixed_s, found.token_s, found.pair_s) >= 0.0


def test_an_average_begins_at_its_first_value_and_follows():
    average = Average()
    average.add(4.0)
    assert average.value == 4.0
    average.add(2.0)
    assert average.value == 3.0
    for _ in range(100):
        average.add(2.0)
    assert average.value == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize(
    "prior", [PrefillCurve(0.0, 0.0, 0.0), PrefillCurve(0.05, 0.0, 0.0), PrefillCurve(0.0, 0.0, 1e-6)]
)
def test_a_prior_without_some_coefficients_is_a_prior_all_the_same(prior):
    fit = CurveFit()
    for tokens in (16, 200, 16):
        fit.observe(0, tokens, TRUE.seconds(0, tokens))
    assert fit.curve(prior).seconds(0, 200) == pytest.approx(TRUE.seconds(0, 200), rel=0.3)


def test_whatever_is_observed_the_curve_is_finite():
    drawn = random.Random(2)
    shared, curve = CurveFit(), PrefillCurve()
    for _ in range(300):
        cached, tokens = drawn.choice([0, 16, 192, 4000]), drawn.choice([1, 7, 14, 15, 900])
        shared.observe(cached, tokens, drawn.choice([1e-5, 0.001, 0.05, 20.0]))
        curve = shared.curve(curve)
        assert 0.0 <= curve.seconds(100, 100) < 1e3
