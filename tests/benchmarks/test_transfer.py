"""The transfer benchmark's arithmetic and page, and one real round of it."""

from __future__ import annotations

import os

import pytest

from benchmarks.demo_accuracy import Score
from benchmarks.transfer import links, report
from benchmarks.transfer.end_to_end import VISUAL_TOKENS, Exposure, Quality


def test_the_median_of_the_best_round_counts():
    samples = links.Samples()
    samples.add("shm", 1000, [9e-6, 1e-6, 9e-6])
    samples.add("shm", 1000, [2e-6, 2e-6, 50e-6])
    assert samples.best_s("shm", 1000) == 2e-6
    assert samples.gigabytes_per_s("shm", 1000) == pytest.approx(0.5)


def test_ratios_of_contenders_that_did_not_take_part_are_left_out():
    samples = links.Samples()
    samples.add("nixl", 1 << 20, [2e-4])
    samples.add("raw nixl", 1 << 20, [1e-4])
    lines = report.link_table(samples, [1 << 20], report.TCP_RATIOS).splitlines()
    assert lines[0] == "| write | nixl | raw nixl | nixl / raw nixl |"
    assert lines[2].endswith("| 0.50 |")
    assert lines[2].startswith("| 1 MiB |")


def test_the_tables_of_whole_requests_give_shares_in_percent():
    exposure = report.exposure_table([Exposure("off", 200.0, 4.0, 0.02, 2048.0, "nixl")])
    assert "| off | 200 | 4.0 | 2.0 % | 2 | nixl |" in exposure
    quality = report.quality_table([Quality("balanced", Score(97, 100), 1024.0, 0.125)])
    assert "| balanced | 97.0 % |" in quality
    assert quality.endswith("| 1 | 12.5 % |")
    assert VISUAL_TOKENS == 576


def test_the_sides_share_no_processor_where_there_are_two():
    here, there = links.halves()
    assert here | there == os.sched_getaffinity(0)
    assert not here & there or len(os.sched_getaffinity(0)) == 1


@pytest.mark.slow
def test_a_round_measures_ours_beside_memcpy_and_raw_nixl():
    before = os.sched_getaffinity(0)
    samples = links.measure([64 << 10], ("shm",), rounds=1)
    assert samples.names() == ["memcpy", "shm", "raw nixl"]
    assert os.sched_getaffinity(0) == before
    assert all(seconds > 0 for rounds in samples.rounds.values() for seconds in rounds[0])
