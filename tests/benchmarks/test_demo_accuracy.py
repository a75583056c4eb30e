"""The accuracy benchmark asks what it says, counts right, and writes what readers and plots expect."""

from __future__ import annotations

import asyncio
import json
import math
from types import SimpleNamespace

import pytest

from benchmarks import demo_accuracy as benchmark
from benchmarks.demo_accuracy import FAMILIES, Question, Score, Scored, Setting
from prismserve.client import ClientError, Usage


class Oracle:
    """Stands where a cluster would: knows every answer, and how many questions were open at once."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.open, self.most = answers, 0, 0

    async def generate(self, question, *, images, compression, temperature, max_tokens):
        assert images[0].startswith(b"\x89PNG")
        assert temperature == 0
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(0.001)
        self.open -= 1
        if question not in self.answers:
            raise ClientError("no such question")
        usage = Usage(ttft_ms=4.0, kv_bytes_sent=100, visual_tokens_after=49)
        return SimpleNamespace(text=f" {self.answers[question]}\n", usage=usage)


def rows():
    scored = [Scored(family, right, 10.0, 2048, 49) for family in FAMILIES for right in (True, True, False, True)]
    return [benchmark.summarise(setting, scored) for setting in benchmark.settings()]


def test_visionzip_and_random_are_compared_at_the_same_counts_beside_no_compression():
    settings = benchmark.settings()
    assert settings[0] == Setting("off", 196, "off")
    assert {(s.method, s.keep) for s in settings[1:]} == {(m, k) for m in ("visionzip", "random") for k in (98, 49, 24)}
    assert settings[1].compression == {"visual": {"method": "visionzip", "keep": 98}}


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_of_wilson(right, asked, low, high):
    assert Score(right, asked).interval == pytest.approx((low, high), abs=5e-5)


def test_intervals_hold_their_share_even_at_the_ends():
    for asked in (1, 3, 50):
        for right in (0, asked):
            low, high = Score(right, asked).interval
            assert 0 <= low <= Score(right, asked).share <= high <= 1
    assert Score(0, 0).interval == (0.0, 1.0)
    assert math.isnan(Score(0, 0).share)


def test_questions_are_held_out_balanced_and_always_the_same():
    questions = benchmark.draw_questions(3)
    assert questions == benchmark.draw_questions(3)
    assert all(question.seed >= 10_000_000 for question in questions)
    assert {family: sum(q.family == family for q in questions) for family in FAMILIES} == dict.fromkeys(FAMILIES, 3)
    assert len({(q.seed, q.family) for q in questions}) == len(questions)


def test_a_row_counts_by_family_and_over_all():
    row = benchmark.summarise(
        benchmark.settings()[1],
        [Scored("color", True, 10, 100, 98), Scored("color", False, 30, 300, 98), Scored("word", True, 20, 200, 98)],
    )
    assert row.families["color"] == Score(1, 2)
    assert row.families["word"] == Score(1, 1)
    assert row.families["shape"] == Score(0, 0)
    assert row.total == Score(2, 3)
    assert (row.ttft_p50_ms, row.kv_bytes_sent_mean, row.visual_tokens_mean) == (20, 200, 98)


async def test_every_question_is_asked_once_with_no_more_in_flight_than_allowed():
    questions = [Question(10_000_000, "color", f"question {number}", f"{number}") for number in range(20)]
    oracle = Oracle({question.text: question.answer for question in questions} | {"question 3": "wrong"})
    answered = []
    image = benchmark.encode(10_000_000)
    scored = await benchmark.ask_all(
        oracle, benchmark.settings()[0], [(q, image) for q in questions], 4, lambda: answered.append(1)
    )
    assert (len(scored), len(answered), oracle.most) == (20, 20, 4)
    assert sum(entry.right for entry in scored) == 19
    assert scored[0].visual_tokens == 49


async def test_a_failed_question_ends_the_run_with_its_own_error():
    question = Question(10_000_000, "color", "unknown", "red")
    with pytest.raises(ClientError, match="no such question"):
        await benchmark.ask_all(
            Oracle({}), benchmark.settings()[0], [(question, benchmark.encode(10_000_000))] * 9, 3, lambda: None
        )


def test_page_document_and_plot_are_written(tmp_path):
    page = benchmark.write(rows(), "Under these conditions.", tmp_path / "results")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(benchmark.settings())
    assert len({line.count("|") for line in lines}) == 1
    assert "| off | 49 | 75.0 |" in page
    assert "**75.0** | 59.8 to 85.8 | 10 ms | 2.0 KiB |" in page
    document = json.loads((tmp_path / "results" / "demo_accuracy.json").read_text())
    assert document["rows"][1]["total"]["right"] == 30
    assert (tmp_path / "results" / "demo_accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flag", ["--per-family", "--concurrency"])
def test_counts_below_one_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([flag, "0"])
    assert f"{flag} must be at least 1" in capsys.readouterr().err
