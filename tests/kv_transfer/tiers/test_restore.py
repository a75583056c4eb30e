from __future__ import annotations

import pytest

from prismserve.kv_transfer.tiers.restore import decide


def plan(tiers, rate=1e9, saved_s=0.064, blocks_min=2, **errors):
    return decide(
        first=3,
        tiers=tiers,
        block_bytes=1_000_000,
        bytes_per_s={"host": rate, "disk": rate / 10},
        saved_s=saved_s,
        blocks_min=blocks_min,
        **errors,
    )


def test_what_is_faster_is_done():
    fast = plan(["host"] * 4)
    assert (fast.first, fast.blocks, fast.reason) == (3, 4, "restore_is_cheaper")
    assert fast.restore_s == pytest.approx(0.005)
    assert fast.saved_s == 0.064
    assert plan(["disk"] * 4, rate=1e8).reason == "compute_is_cheaper"
    assert not plan(["host"] * 4, saved_s=1e-6).worth_it


def test_what_may_turn_out_slower_is_not_tried():
    assert plan(["host"] * 4, restore_error=12.0).worth_it
    close = plan(["host"] * 4, restore_error=13.0)
    assert (close.blocks, close.reason) == (0, "too_close")
    assert plan(["host"] * 4, restore_error=6.5, compute_error=0.5).reason == "too_close"
    assert plan(["host"] * 4, restore_error=0.5, compute_error=0.05).worth_it


def test_good_luck_does_not_make_the_slower_way_worth_it():
    assert plan(["host"] * 4, saved_s=0.004, restore_error=0.1).reason == "compute_is_cheaper"


def test_short_runs_and_empty_ones_are_left():
    assert plan(["host"]).reason == "too_short"
    assert plan([]).reason == "not_held"


def test_before_anything_was_measured_a_restore_is_tried():
    first = plan(["host", "disk"], rate=0.0, saved_s=float("inf"))
    assert first.blocks == 2
    assert first.saved_s == float("inf")
