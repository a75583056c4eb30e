from __future__ import annotations

import pytest

from prismserve.kv_transfer.tiers.calibration import Calibration


def test_quantiles_are_of_measured_over_predicted_time():
    errors = Calibration()
    assert errors.quantile(0.95) == 1.0
    for number in range(1, 21):
        errors.add(0.01, 0.01 * number)
    assert errors.quantile(0.0) == pytest.approx(1.0)
    assert errors.quantile(0.5) == pytest.approx(11.0)
    assert errors.quantile(0.95) == pytest.approx(20.0)


def test_only_the_latest_count():
    errors = Calibration()
    errors.add(1.0, 1000.0)
    for _ in range(64):
        errors.add(1.0, 2.0)
    assert len(errors) == 64
    assert errors.quantile(1.0) == 2.0


def test_a_bad_time_can_be_forgotten():
    errors = Calibration()
    errors.add(0.001, 1.0)
    errors.forget()
    errors.forget()
    assert len(errors) == 0
    assert errors.quantile(0.95) == 1.0


def test_a_prediction_of_no_time_is_no_reason_to_fail():
    errors = Calibration()
    errors.add(0.0, 0.5)
    assert errors.quantile(0.5) == pytest.approx(5e5)
