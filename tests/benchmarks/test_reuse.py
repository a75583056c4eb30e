"""The benchmark of reuse: its simulated cache by hand, and a small run over two workers."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks.reuse import __main__ as reuse
from benchmarks.reuse.simulation import Observed, hit_rates
from benchmarks.reuse.turns import Turns
from benchmarks.reuse.workloads import Script
from prismserve.core.types import CompressionPlan, Prompt, Request, SamplingParams, TextSegment

ROOT = b"r" * 32


def observed(tokens, started_s, first_s, ended_s, cached=0, answer=()):
    request = Request(
        "r", 0, ROOT, ROOT, Prompt((TextSegment(tuple(tokens)),)), (), SamplingParams(), CompressionPlan()
    )
    return Observed(request, answer, cached, started_s, first_s, ended_s)


def test_a_prompt_is_found_by_those_asked_after_its_first_token() -> None:
    first = observed(range(8), 0.0, 1.0, 2.0)
    too_early = observed(range(8), 0.5, 1.0, 2.0)
    after = observed(range(8), 1.5, 2.0, 3.0, cached=4)
    # Of 8 + 8 + 8 tokens: 7 of the last one, whose final token is always computed; it says it found 4.
    assert hit_rates([first, too_early, after], 4) == (4 / 24, 7 / 24)


def test_an_answer_is_found_once_it_has_ended_and_without_its_last_token() -> None:
    first = observed(range(4), 0.0, 1.0, 2.0, answer=(4, 5, 6, 7, 8))
    assert hit_rates([first, observed(range(10), 1.5, 3.0, 4.0)], 4)[1] == 4 / 14
    assert hit_rates([first, observed(range(10), 2.5, 3.0, 4.0)], 4)[1] == 8 / 14
    short = observed(range(4), 0.0, 1.0, 2.0, answer=(4, 5, 6, 7))
    assert hit_rates([short, observed(range(10), 2.5, 3.0, 4.0)], 4)[1] == 7 / 14


def test_of_a_block_that_is_not_held_whole_the_common_beginning_counts() -> None:
    first = observed([1, 2, 3, 4, 5, 6, 7, 8], 0.0, 1.0, 2.0)
    assert hit_rates([first, observed([1, 2, 3, 4, 5, 6, 9, 9], 2.5, 3.0, 4.0)], 4)[1] == 6 / 16
    assert hit_rates([first, observed([1, 2, 9, 4, 5, 6, 7, 8], 2.5, 3.0, 4.0)], 4)[1] == 2 / 16


def test_a_chat_goes_on_from_its_answers() -> None:
    script = Script((b"file",), ("a", "b", "c"), chat=True)
    assert script.turn(0, ()).texts == ("a",)
    assert script.turn(2, ("x", "y")).texts == ("a", "x", "b", "y", "c")


@pytest.mark.slow
def test_a_small_run_over_two_workers_writes_its_page(tmp_path) -> None:
    arguments = ["--workers", "2", "--pictures", "2", "--questions", "2", "--chats", "2", "--out", str(tmp_path)]
    assert reuse.main(arguments) == 0
    rows = json.loads((tmp_path / "reuse.json").read_text())["rows"]
    assert [row["requests"] for row in rows] == [4, 8]
    assert all(row["hit_rate"] > 0 for row in rows)
    assert "points behind" in (tmp_path / "reuse.md").read_text()


async def test_what_is_asked_for_comparison_runs_alone() -> None:
    turns, inside, seen = Turns(), set(), []

    async def ask(name: str, *, alone: bool) -> None:
        async with turns.alone() if alone else turns.together():
            inside.add(name)
            await asyncio.sleep(0.01)
            seen.append((name, len(inside)))
            inside.discard(name)

    async with asyncio.timeout(5):
        await asyncio.gather(
            ask("a", alone=False),
            ask("b", alone=False),
            ask("c", alone=True),
            ask("d", alone=False),
            ask("e", alone=True),
        )
    assert sorted(name for name, _ in seen) == ["a", "b", "c", "d", "e"]
    assert {count for name, count in seen if name in "ce"} == {1}
    assert dict(seen)["a"] == 2
