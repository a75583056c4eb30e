from __future__ import annotations

import pytest

from benchmarks.asking import request_about, scored
from benchmarks.demo_accuracy import Question, Score
from prismserve.compression import loader
from prismserve.core.types import CompressionPlan, MediaInput, MediaSegment, TextSegment
from prismserve.models.processing import ImageSlot


def plan_of(name, **parameters):
    return CompressionPlan(
        visual=loader.normalise(loader.visual_method(name), parameters, "compression.visual"),
    )


@pytest.mark.parametrize(("before", "after"), [([1, 2], [3]), ([], [3]), ([1], [])])
def test_a_medium_stands_where_the_prompt_has_its_slot(before, after):
    media = (MediaInput(b"x", bytes(32), 4, 4), MediaSegment(0, b"key", 7, 9))
    rendered = [*before, ImageSlot(0), *after]
    request = request_about("0", rendered, media, plan_of("none"), (5,), namespace="test", max_tokens=2)
    texts = [TextSegment(tuple(part)) for part in (before, after)]
    assert request.prompt.segments == tuple(one for one in (texts[0], media[1], texts[1]) if one.tokens)
    assert (request.media, request.scoring_token_ids, request.sampling.max_tokens) == ((media[0],), (5,), 2)


def test_plans_and_benchmarks_share_no_prefix():
    media = (MediaInput(b"x", bytes(32), 4, 4), MediaSegment(0, b"key", 7, 9))
    roots = {
        request_about("0", [1, ImageSlot(0)], media, plan, (), namespace=name, max_tokens=1).namespace
        for plan in (plan_of("none"), plan_of("random", keep=4))
        for name in ("one", "other")
    }
    assert len(roots) == 4


def test_an_answer_counts_for_its_family_where_it_is_the_same_text():
    class Words:
        def decode(self, ids):
            return " ".join({1: "red", 2: "blue"}[one] for one in ids) + " "

    questions = [
        Question(0, "color", "?", "red"),
        Question(0, "color", "?", "blue"),
        Question(1, "pair", "?", "red blue"),
    ]
    got = scored(Words(), questions, {"0": [1], "1": [1], "2": [1, 2]}, ("color", "pair", "never"))
    assert got == {"color": Score(1, 2), "pair": Score(1, 1)}
