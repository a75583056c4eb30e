"""The index benchmark checks every answer it times, and measures what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.index.__main__ import _probe
from benchmarks.index.probe import Chain, MirrorStore, load, lookup_us
from benchmarks.index.served import lag_ms, mget_us, rebuild_s


def test_a_load_has_as_many_blocks_as_it_should_and_chains_of_both_lengths():
    chains = load(10_000)
    assert 9_872 < sum(chain.blocks for chain in chains) <= 10_000
    assert {chain.blocks for chain in chains} == {128, 2048}
    assert load(10_000) == chains
    assert chains[0].keys() == chains[0].keys()


def test_a_probe_measures_everything_in_a_process_of_its_own():
    figures = _probe(Path(sys.executable), "mirror", 6_000)
    assert set(figures) == {
        "insert_us_per_block",
        "memory_bytes_per_block",
        *(f"match_{n}_{which}_{p}_us" for n in (128, 2048) for which in ("first", "again") for p in ("p50", "p99")),
    }
    assert json.dumps(figures)
    assert all(figures[name] > 0 for name in figures if name.endswith("_us"))


def test_a_wrong_answer_stops_the_benchmark():
    store = MirrorStore()
    chain = Chain(4, 8)
    for event in store.events(4, chain.keys()):
        store.apply(4, event)
    with pytest.raises(RuntimeError, match="a lookup gave"):
        lookup_us(store, chain)


def test_lag_rebuilding_and_mget_are_measured_through_a_real_server():
    lags = lag_ms(10, 100)
    assert len(lags) == 10
    assert 0 < min(lags) < 1000
    assert set(rebuild_s(2_000)) == {"snapshot_s", "flushed_s"}
    assert mget_us(5_000)["mget_128_p50_us"] > 0
