"""The demo asks what its scenes can answer, and judges strictly what came back."""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from prismserve.client import ClusterStatus, Usage, WorkerStatus
from prismserve.cluster.commands import demo
from prismserve.cluster.footprint import Leftovers
from prismserve.cluster.served import Shutdown
from prismserve.core.errors import EngineError
from prismserve.core.types import WorkerStats
from prismserve.models.reference.scenes import make_scene

WORKERS = ClusterStatus(
    workers=(
        WorkerStatus("prefill-0", "prefill", 101, "node", "ready", 1, WorkerStats()),
        WorkerStatus("decode-0", "decode", 102, "node", "ready", 1, WorkerStats()),
    ),
    document={},
)


def outcome(ask: demo.Ask, **usage) -> demo.Outcome:
    report = {
        "prompt_tokens": 210,
        "completion_tokens": 2,
        "cached_tokens": 192 if ask.cached else 0,
        "visual_tokens_before": 196,
        "visual_tokens_after": ask.keep or 196,
        "kv_bytes_sent": 100_000,
        "transport": "nixl",
        "prefill_worker": "prefill-0",
        "decode_worker": "decode-0",
        "images": 1,
    }
    return demo.Outcome(ask, f"{ask.family} {ask.index}?", "red", "red", Usage(**(report | usage)), 0.05, 0.1)


def outcomes() -> list[demo.Outcome]:
    return [outcome(ask) for ask in demo.ASKS]


def failed(findings) -> set[str]:
    return {finding.name for finding in findings if not finding.held}


def test_it_asks_at_least_five_questions_about_three_pictures_through_both_doors():
    assert len(demo.ASKS) >= 5
    assert len({ask.picture for ask in demo.ASKS}) >= 3
    assert {ask.door for ask in demo.ASKS} == {"openai", "grpc"}
    assert any(ask.cached for ask in demo.ASKS)
    assert any(ask.keep == 49 for ask in demo.ASKS)


def test_every_question_exists_in_its_scene():
    scenes = {name: make_scene(seed)[1] for name, seed in demo._SEEDS.items()}
    for ask in demo.ASKS:
        assert len([entry for entry in scenes[ask.picture] if entry[0] == ask.family]) > ask.index


def test_a_run_in_which_everything_held_has_no_failed_finding():
    assert not failed(demo.judge(outcomes(), WORKERS))


def test_one_wrong_answer_is_forgiven_and_two_are_not():
    answers = outcomes()
    answers[2] = dataclasses.replace(answers[2], answer="blue")
    assert not failed(demo.judge(answers, WORKERS))
    answers[3] = dataclasses.replace(answers[3], answer="blue")
    assert failed(demo.judge(answers, WORKERS)) == {"answers"}


@pytest.mark.parametrize(
    "usage", [{"kv_bytes_sent": 0}, {"decode_worker": "prefill-0"}, {"prefill_worker": ""}, {"decode_worker": "other"}]
)
def test_work_that_never_crossed_between_two_workers_is_found(usage):
    assert failed(demo.judge([outcome(ask, **usage) for ask in demo.ASKS], WORKERS)) == {"two processes"}


def test_two_workers_in_one_process_are_found():
    one = dataclasses.replace(WORKERS, workers=tuple(dataclasses.replace(w, pid=7) for w in WORKERS.workers))
    assert failed(demo.judge(outcomes(), one)) == {"two processes"}


def test_keeping_another_number_of_visual_tokens_than_asked_is_found():
    answers = [outcome(ask, visual_tokens_after=196) for ask in demo.ASKS]
    assert failed(demo.judge(answers, WORKERS)) == {"compression"}


def test_a_repeat_that_was_computed_again_is_found():
    assert failed(demo.judge([outcome(ask, cached_tokens=0) for ask in demo.ASKS], WORKERS)) == {"caches"}


def test_two_answers_to_one_exact_question_are_found():
    answers = outcomes()
    answers[-1] = dataclasses.replace(answers[-1], answer="blue")
    assert failed(demo.judge(answers, WORKERS)) == {"exactness"}


def test_a_stop_with_leftovers_or_a_bad_status_is_found():
    assert not failed(demo.judge_shutdown(Shutdown(0, 1.0, Leftovers())))
    assert failed(demo.judge_shutdown(Shutdown(1, 1.0, Leftovers()))) == {"clean stop"}
    left = Shutdown(0, 1.0, Leftovers(processes=("12 raylet",)))
    assert failed(demo.judge_shutdown(left)) == {"nothing left"}


def test_the_tables_show_what_a_reader_looks_for():
    console = Console(width=demo._WIDTH_MIN, record=True, file=io.StringIO())
    console.print(demo.answers_table(outcomes()), demo.cost_table(outcomes()))
    text = console.export_text()
    for expected in (
        "visionzip 98 + int8",
        "196 -> 49",
        "97.7 KiB",
        "nixl",
        "prefill-0",
        "decode-0",
        "50 ms",
        "192 of",
    ):
        assert expected in text
    assert "…" not in text


def test_the_usage_report_of_the_openai_package_is_read():
    usage = SimpleNamespace(
        prompt_tokens=210,
        completion_tokens=2,
        prompt_tokens_details=SimpleNamespace(cached_tokens=64),
        prismserve={"visual_tokens_before": 196, "kv_bytes_sent": 5, "transport": "shm", "of_a_newer_server": 1},
    )
    assert demo.usage_of_openai(usage) == Usage(
        prompt_tokens=210,
        completion_tokens=2,
        cached_tokens=64,
        visual_tokens_before=196,
        kv_bytes_sent=5,
        transport="shm",
    )


def test_an_answer_without_a_usage_report_is_an_error():
    with pytest.raises(EngineError, match=r"usage\.prismserve"):
        demo.usage_of_openai(SimpleNamespace(prompt_tokens=1, completion_tokens=1, prompt_tokens_details=None))
