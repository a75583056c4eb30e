"""Presets step back on evidence, stay back for a while, and come back on better evidence."""

from __future__ import annotations

import itertools

import pytest

from prismserve.core.errors import InvalidRequestError
from prismserve.router.fidelity.compare import Comparison
from prismserve.router.fidelity.config import FidelityConfig
from prismserve.router.fidelity.judge import CHAIN, Control, Judge, lower_share

GOOD, BAD = Comparison(None, 0.001), Comparison(3, 0.9)


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def judge(clock, **config):
    return Judge(FidelityConfig(**{"samples_min": 10, "window": 40, "recover_after_s": 100.0, **config}), clock)


def feed(subject, preset, *comparisons):
    return [turn for item in comparisons if (turn := subject.record(preset, item)) is not None]


def test_without_evidence_every_preset_is_in_force(clock):
    subject = judge(clock)
    assert [subject.in_force(name) for name in (*CHAIN, "off", "custom")] == [*CHAIN, "off", "custom"]
    assert [subject.probe(name) for name in (*CHAIN, "off", "", "custom")] == [None] * 6


def test_a_bad_preset_steps_back_one_by_one_to_off(clock):
    subject = judge(clock)
    for name, milder in (("turbo", "balanced"), ("balanced", "quality"), ("quality", "off")):
        assert subject.in_force("turbo") == name
        assert feed(subject, name, *[BAD] * 10) == ["back"]
        assert subject.in_force(name) == milder
    assert [subject.in_force(name) for name in CHAIN] == ["off"] * 3
    assert subject.probe("turbo") == "quality"


def test_a_milder_preset_is_not_touched_by_what_a_stronger_one_does(clock):
    subject = judge(clock)
    feed(subject, "turbo", *[BAD] * 10)
    assert subject.in_force("balanced") == "balanced"
    assert subject.status()["balanced"]["comparisons"] == 0


def test_too_little_evidence_decides_nothing(clock):
    subject = judge(clock)
    assert feed(subject, "turbo", *[BAD] * 9) == []
    assert subject.in_force("turbo") == "turbo"


@pytest.mark.parametrize(("bad", "back"), [(2, False), (3, False), (4, False), (8, False), (9, True), (10, True)])
def test_the_lower_end_of_the_interval_must_pass_the_bound(clock, bad, back):
    subject = judge(clock, samples_min=20, turbo_disagreement_max=0.25)
    turns = feed(subject, "turbo", *[GOOD] * (20 - bad), *[BAD] * bad)
    assert bool(turns) == back == (lower_share(bad, 20) > 0.25)


def test_old_comparisons_leave_the_window(clock):
    subject = judge(clock, turbo_disagreement_max=0.5)
    feed(subject, "turbo", *[BAD] * 4, *[GOOD] * 40)
    assert subject.status()["turbo"]["disagreed"] == 0
    assert subject.status()["turbo"]["comparisons"] == 44


def test_a_mean_divergence_above_its_bound_steps_back_as_well(clock):
    far = Comparison(None, 0.8)
    assert feed(judge(clock), "quality", *[far] * 40) == []
    assert feed(judge(clock, kl_max_nats=0.5), "quality", *[far] * 10) == ["back"]


def test_replays_bring_a_preset_back_only_after_its_rest_and_only_if_they_are_good(clock):
    subject = judge(clock)
    feed(subject, "balanced", *[BAD] * 10)
    assert subject.probe("balanced") == "balanced"
    assert feed(subject, "balanced", *[GOOD] * 30) == []
    assert subject.in_force("balanced") == "quality"
    clock.now_s = 100.0
    assert feed(subject, "balanced", GOOD) == ["forth"]
    assert subject.in_force("balanced") == "balanced"
    assert subject.status()["balanced"]["compared"] == 0


def test_a_preset_at_its_bound_stays_where_it_is_on_either_side(clock):
    """Hysteresis: what is too little to step back is too much to come back."""
    row = [BAD, GOOD, GOOD, GOOD] * 10
    there = judge(clock, turbo_disagreement_max=0.25)
    assert feed(there, "turbo", *row) == []
    back = judge(clock, turbo_disagreement_max=0.25)
    feed(back, "turbo", *[BAD] * 10)
    clock.now_s = 1000.0
    assert feed(back, "turbo", *row) == []
    assert back.in_force("turbo") == "balanced"


def test_presets_come_back_in_order_the_mildest_first(clock):
    subject = judge(clock)
    for name in CHAIN:
        feed(subject, name, *[BAD] * 10)
    clock.now_s = 200.0
    seen = []
    for _ in range(60):
        probe = subject.probe("turbo")
        if probe is None:
            break
        if feed(subject, probe, GOOD) == ["forth"]:
            seen.append(subject.in_force("turbo"))
    assert seen == ["quality", "balanced", "turbo"]


def test_an_operator_has_the_last_word_until_auto(clock):
    subject = judge(clock)
    subject.control("turbo", Control.HOLD)
    assert (subject.in_force("turbo"), subject.probe("turbo")) == ("balanced", None)
    assert feed(subject, "turbo", *[GOOD] * 50) == []
    subject.control("turbo", Control.RELEASE)
    assert feed(subject, "turbo", *[BAD] * 50) == []
    assert subject.in_force("turbo") == "turbo"
    subject.control("turbo", Control.AUTO)
    assert feed(subject, "turbo", *[BAD] * 9) == []
    assert feed(subject, "turbo", BAD) == ["back"]
    with pytest.raises(InvalidRequestError, match="turbo, balanced, quality"):
        subject.control("off", Control.HOLD)


def test_where_stepping_back_is_off_evidence_is_only_shown(clock):
    subject = judge(clock, step_back=False)
    assert feed(subject, "turbo", *[BAD] * 100) == []
    assert subject.in_force("turbo") == "turbo"
    assert subject.status()["turbo"]["disagreed"] == 40


def test_the_status_says_why_and_since_when(clock):
    subject = judge(clock)
    clock.now_s = 5.0
    feed(subject, "turbo", *[BAD] * 10)
    clock.now_s = 12.5
    entry = subject.status()["turbo"]
    assert (entry["held"], entry["in_force"], entry["steps"], entry["since_s"]) == (True, "balanced", 1, 7.5)
    assert entry["reason"] == "10 of 10 answers differ, the bound is 0.25"


def test_the_interval_is_wilsons():
    for hits, trials in itertools.product(range(21), (20,)):
        p, z, n = hits / trials, 1.645, trials
        root = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
        assert lower_share(hits, trials) == pytest.approx(max(0.0, (p + z * z / (2 * n) - root) / (1 + z * z / n)))
    assert lower_share(0, 0) == 0.0
