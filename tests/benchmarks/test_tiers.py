"""The benchmark of tiers: what it measures is checked, and a small run writes its page."""

from __future__ import annotations

import json

import pytest

from benchmarks.tiers import __main__ as tiers
from benchmarks.tiers.restores import Case
from benchmarks.tiers.stores import Rates, disk_rates, host_rates


def test_every_contender_moves_the_same_bytes(tmp_path) -> None:
    host = host_rates(block_bytes=5000, blocks=8, rounds=3)
    assert {name: len(rounds) for name, rounds in host.rounds.items()} == {"memcpy": 3, "host put": 3, "host get": 3}
    disk, _ = disk_rates(tmp_path, block_bytes=5000, blocks=8, rounds=2, threads=2)
    assert {name: len(rounds) for name, rounds in disk.rounds.items()} == {"disk put": 1, "raw read": 2, "disk get": 2}


def test_a_ratio_compares_what_ran_in_the_same_round() -> None:
    rates = Rates({"ours": [1.0, 30.0, 5.0], "theirs": [2.0, 60.0, 5.0]})
    assert rates.ratio("ours", "theirs") == 0.5


def test_a_restore_is_slower_only_if_something_was_restored() -> None:
    assert Case(10, 0, 1.0, 1.5, restored=True).slower
    assert not Case(10, 0, 1.0, 1.5, restored=False).slower
    assert not Case(10, 0, 1.0, 0.5, restored=True).slower


@pytest.mark.slow
def test_a_small_run_writes_its_page(tmp_path) -> None:
    arguments = ["--rounds", "1", "--blocks", "16", "--prompts", "2", "--repeats", "1"]
    assert tiers.main([*arguments, "--folder", str(tmp_path), "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "tiers.json").read_text())
    assert {tier: len(cases) for tier, cases in figures["requests"].items()} == {"host": 2, "disk": 2}
    page = (tmp_path / "tiers.md").read_text()
    assert "LMCache was not measured" in page
    assert page.count("<= 1 %") == 2
