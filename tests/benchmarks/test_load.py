"""The benchmark of what compression buys: what it asks, how it judges, and a small run in one process and in three."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.load import __main__ as load
from benchmarks.load.measure import Measured, Plan, turned
from benchmarks.load.report import disturbed, verdicts
from benchmarks.load.work import OFF, Variant, draw, variants

METHODS = variants(["prism", "prefill/pyramiddrop"])
EIGHTH = Variant("visual", "prism", 0.125)


def measured(ttft_s, requests_per_s):
    result = Measured()
    for variant in METHODS:
        result.ttft_s.values[variant] = list(ttft_s.get(variant, (1.0, 1.0)))
        result.requests_per_s.values[variant] = list(requests_per_s.get(variant, (1.0, 1.0)))
    return result


def plan():
    return Plan(METHODS, variants(["prism"]), 2, 2, 4, 4)


def test_the_time_to_first_token_is_judged_within_a_round():
    slow_then_fast = measured({OFF: (8.0, 2.0), EIGHTH: (2.0, 1.0)}, {})
    (found, _) = verdicts(slow_then_fast, plan())
    # Four times in the one round, twice in the other.
    assert (found["what"], found["value"], found["met"]) == ("prism 12.5 %", 3.0, True)
    (missed, _) = verdicts(measured({OFF: (8.0, 2.0), EIGHTH: (8.0, 1.0)}, {}), plan())
    assert (missed["value"], missed["met"]) == (1.5, False)


def test_an_engine_that_does_not_get_its_cores_is_told_from_one_that_uses_them():
    result = measured({OFF: (2.0, 2.0)}, {})
    assert not disturbed(result, replace(plan(), threads=2))
    result.ttft_cpu_s.values[OFF] = [3.9, 3.8]
    assert not disturbed(result, replace(plan(), threads=2))
    result.ttft_cpu_s.values[OFF] = [2.1, 2.0]
    assert disturbed(result, replace(plan(), threads=2))


def test_throughput_that_falls_at_one_step_misses_its_target():
    rates = {
        OFF: (1.0,),
        Variant("visual", "prism", 0.5): (2.0,),
        Variant("visual", "prism", 0.25): (1.5,),
        EIGHTH: (3.0,),
    }
    (_, found) = verdicts(measured({}, rates), plan())
    assert (found["what"], found["value"], found["met"]) == ("prism", 0.75, False)
    (_, rises) = verdicts(measured({}, {**rates, Variant("visual", "prism", 0.25): (2.5,)}), plan())
    assert rises["met"]


def test_every_row_of_a_round_is_asked_the_same_and_every_round_something_else():
    first, again = draw(1, 3, 4, OFF), draw(1, 3, 4, EIGHTH)
    assert [turn.texts for turn in first] == [turn.texts for turn in again]
    assert [turn.pictures for turn in first] == [turn.pictures for turn in again]
    assert len({turn.texts for turn in (*first, *draw(2, 3, 4, OFF))}) == 6
    assert len({turn.pictures for turn in (*first, *draw(2, 3, 4, OFF))}) == 6
    assert first[0].call().options["ignore_eos"]
    assert again[0].call().compression == {"preset": "off", "visual": {"method": "prism", "keep": 0.125}}
    assert METHODS[-1].field == {"preset": "off", "prefill": {"method": "pyramiddrop", "keep": 0.125}}


def test_every_variant_is_first_in_some_round():
    assert {turned(METHODS, number)[0] for number in range(len(METHODS))} == set(METHODS)
    assert all(sorted(turned(METHODS, number), key=METHODS.index) == list(METHODS) for number in range(3))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--methods", "nope"], "no method 'nope'"),
        (["--loaded", "prefill/prism"], "no method"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, says, capsys):
    with pytest.raises(SystemExit):
        load.main(flags)
    assert says in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [False, True])
def test_a_tiny_run_writes_page_document_and_plot(cluster, tmp_path, capsys):
    flags = ["--tiny", "--methods", "prism,prefill/pyramiddrop", "--rounds", "2", "--load-rounds", "1", "--batch", "3"]
    flags += ["--tokens", "3", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    assert load.main([*flags, *(["--cluster"] if cluster else [])]) == 0, capsys.readouterr().err
    name = "cluster_load" if cluster else "load"
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert set(document["rounds"]["ttft_s"]) == {variant.name for variant in METHODS}
    assert all(len(values) == 2 and min(values) > 0 for values in document["rounds"]["ttft_s"].values())
    # 25 visual tokens; what a prefill method leaves is counted behind its last cut.
    left = {name: ran["answers"][0]["visual_after"] for name, ran in document["last"]["alone"].items()}
    assert left["off"] == 25
    assert left["prism 12.5 %"] == left["prefill/pyramiddrop 12.5 %"] == 3
    kept = {name: ran["answers"][0]["kv_bytes"] for name, ran in document["last"]["alone"].items()}
    assert kept["prism 12.5 %"] < kept["prism 50 %"] < kept["off"]
    loaded = document["last"]["loaded"]
    assert [answer["tokens"] for answer in loaded["prism 25 %"]["answers"]] == [3, 3, 3]
    if cluster:
        assert all(answer["kv_sent_bytes"] > 0 for ran in loaded.values() for answer in ran["answers"])
    else:
        assert loaded["prism 12.5 %"]["peak_blocks"] < loaded["off"]["peak_blocks"]
    assert "| prism | 12.5 % | 3 |" in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
