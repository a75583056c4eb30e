"""The transfer benchmark's arithmetic and pages, and one real round of each part."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest

from benchmarks.demo_accuracy import Score
from benchmarks.engine.checkpoints import LLAVA
from benchmarks.transfer import __main__ as benchmark
from benchmarks.transfer import accuracy, conditions, end_to_end, exposure, links, report
from benchmarks.transfer.accuracy import Answers


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


def usage(**changes):
    told = {
        "ttft_ms": 200.0,
        "encode_ms": 40.0,
        "prefill_ms": 150.0,
        "transfer_exposed_ms": 4.0,
        "kv_bytes_sent": 2048,
        "transport": "nixl",
        "prompt_tokens": 40,
        "visual_tokens_before": 80,
        "visual_tokens_after": 20,
        "kv_bytes_before": 100 * 512,
    }
    return SimpleNamespace(**told | changes)


def test_a_plan_is_judged_by_the_median_share_of_its_pictures():
    plan = exposure.plans(LLAVA)[0]
    usages = [usage(transfer_exposed_ms=ms) for ms in (2.0, 4.0, 100.0)]
    row = exposure.summarise(plan, usages)
    assert (row.exposed_ms, row.share, row.share_max, row.met) == (4.0, 0.02, 0.5, True)
    assert row.bound == pytest.approx(0.05)
    assert not exposure.summarise(plan, [usage(transfer_exposed_ms=11.0)]).met


def test_the_two_plans_with_targets_are_those_of_576_exact_and_64_quantised_tokens():
    plans = exposure.plans(LLAVA)
    assert len(plans) == 6
    targets = {(plan.visual_tokens, plan.codec): plan.target for plan in plans if plan.target is not None}
    assert targets == {(576, "none"): 0.05, (64, "int8"): 0.02}


def test_bytes_are_beside_the_kv_of_all_visual_tokens_and_points_are_lost_question_by_question():
    half = accuracy.Setting("prism", 0.5, "int8")
    answers = {
        accuracy.EXACT: Answers(dict(enumerate([True] * 9 + [False])), [usage(kv_bytes_sent=100 * 512)]),
        half: Answers(dict(enumerate([True] * 8 + [False, True])), [usage(kv_bytes_sent=20 * 512)]),
        half.control: Answers(dict(enumerate([False] * 10)), [usage()]),
    }
    row = accuracy.summarise(half, answers, 4)
    # 80 of 100 tokens are visual.
    assert (row.share, row.share_16_bits) == (0.25, 0.5)
    assert row.lost == 0.0  # one question worse and one better
    assert row.lost_interval == (pytest.approx(-27.7, abs=0.05), pytest.approx(27.7, abs=0.05))
    assert row.met
    assert row.control == Score(0, 10)
    exact = accuracy.summarise(accuracy.EXACT, answers, 4)
    assert exact.control is None
    assert not exact.met


def test_points_lost_have_the_interval_of_paired_proportions():
    # Wald's: 20 worse and 9 better of 263.
    low, high = accuracy.paired_interval(20, 9, 263)
    assert low == pytest.approx(100 * (11 - 1.959964 * (29 - 121 / 263) ** 0.5) / 263)
    assert low + high == pytest.approx(2 * 100 * 11 / 263)


def test_every_pruned_setting_is_asked_beside_its_control():
    every = accuracy.with_controls(accuracy.SETTINGS)
    assert every[0] == accuracy.EXACT
    pruned = [setting for setting in accuracy.SETTINGS if setting.visual != "none"]
    assert all(accuracy.Setting("random", setting.keep, setting.codec) in every for setting in pruned)
    assert len(every) == len(accuracy.SETTINGS) + len(pruned)


def test_a_page_says_which_targets_were_missed():
    row = exposure.summarise(exposure.plans(LLAVA)[0], [usage(transfer_exposed_ms=20.0)])
    exposed = {"rows": exposure.document([row]), "model": "0.45 B", "measured": "At some time."}
    text = end_to_end.page({"exposed": exposed | {"conditions": {"others_share": 0.1}}})
    assert "stretched" not in text
    assert "stretched" in end_to_end.page({"exposed": exposed | {"conditions": {"others_share": 0.8}}})
    assert "| 20 | none | 200 | 40 | 150 | 20.00 | 10.00 % |" in text
    assert "target at most 5 %, measured 10.00 %: missed." in text
    assert "Bytes for a picture" not in text


def test_conditions_tell_others_from_ourselves():
    with conditions.observed() as seen:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
    assert 0.0 <= seen.others_share <= 1.0
    assert seen.load_after >= 0.0
    assert f"Load average {seen.load_before:.1f} before" in seen.sentence()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--end-to-end", "exposed", "nothing"], "unknown parts nothing"),
        (["--end-to-end", "--rounds", "0"], "must be at least 1"),
        (["--end-to-end", "--per-family", "0"], "must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_what_measures_nothing_is_refused(flags, says, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert says in capsys.readouterr().err


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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_quick_run_of_whole_requests_writes_page_and_file(tmp_path, capsys):
    flags = ["--end-to-end", "--quick", "--rounds", "1", "--per-family", "1"]
    out = tmp_path / "results"
    assert benchmark.main([*flags, "--cache", str(tmp_path / "cache"), "--out", str(out)]) == 0
    assert "worker is ready after" in capsys.readouterr().err
    document = json.loads((out / "transfer_end_to_end.json").read_text())
    exposed = {(row["visual_tokens"], row["codec"]): row for row in document["exposed"]["rows"]}
    assert set(exposed) == {(tokens, codec) for tokens in (25, 12) for codec in exposure.CODECS}
    assert all(0 < row["exposed_ms"] < row["ttft_ms"] for row in exposed.values())
    assert exposed[25, "int8"]["kv_bytes_sent"] < exposed[25, "none"]["kv_bytes_sent"]
    exact, *others = document["accuracy"]["rows"]
    assert exact["share"] > 1.0  # the question is text, and counted above alone
    assert all(row["share"] < exact["share"] and row["score"]["asked"] == 10 for row in others)
    assert others[-1]["control"]["asked"] == 10
    page = (out / "transfer_end_to_end.md").read_text()
    assert "## Exposed transfer" in page
    assert "| prism 50 %, int8 | 98 |" in page


def test_a_part_that_is_not_measured_stays_as_it_was(tmp_path, monkeypatch):
    row = exposure.summarise(exposure.plans(LLAVA)[0], [usage()])
    told = iter(
        ({"rows": exposure.document([row]), "model": "first"}, {"rows": exposure.document([row]), "model": "again"})
    )
    monkeypatch.setattr(end_to_end, "_exposed", lambda _: next(told))
    exact = accuracy.summarise(accuracy.EXACT, {accuracy.EXACT: Answers({0: True}, [usage()])}, 4)
    monkeypatch.setattr(end_to_end, "_accuracy", lambda _: {"rows": accuracy.document([exact])})
    end_to_end.run(end_to_end.Options(parts=("exposed",)), tmp_path)
    text = end_to_end.run(end_to_end.Options(parts=("accuracy",)), tmp_path)
    assert "(first)" in text
    assert "all tokens, none" in text
    assert "(again)" in end_to_end.run(end_to_end.Options(parts=("exposed",)), tmp_path)
