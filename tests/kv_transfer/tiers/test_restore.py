from __future__ import annotations

from prismserve.kv_transfer.tiers.restore import decide


def plan(tiers, rate=1e9, prefill=1000.0, blocks_min=2):
    return decide(
        first=3,
        tiers=tiers,
        block_bytes=1_000_000,
        block_tokens=16,
        bytes_per_s={"host": rate, "disk": rate / 10},
        prefill_tokens_per_s=prefill,
        blocks_min=blocks_min,
    )


def test_what_is_faster_is_done():
    fast = plan(["host"] * 4)
    assert (fast.first, fast.blocks, fast.reason) == (3, 4, "restore_is_cheaper")
    assert fast.restore_s < fast.compute_s == 0.064
    assert plan(["disk"] * 4, rate=1e8).reason == "compute_is_cheaper"
    assert not plan(["host"] * 4, prefill=1e9).worth_it


def test_short_runs_and_empty_ones_are_left():
    assert plan(["host"]).reason == "too_short"
    assert plan([]).reason == "not_held"


def test_before_anything_was_measured_a_restore_is_tried():
    first = plan(["host", "disk"], rate=0.0, prefill=0.0)
    assert first.blocks == 2
    assert first.compute_s == float("inf")
