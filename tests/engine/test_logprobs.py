from __future__ import annotations

import math

import torch

from prismserve.core.types import SamplingParams
from prismserve.engine.logprobs import LOGPROB_MIN, RawScores
from prismserve.engine.sampler import GREEDY, NO_TOKEN, SampleRow


def row(logprobs: int | None) -> SampleRow:
    return SampleRow(SamplingParams(logprobs=logprobs), 0)


def test_values_are_those_of_the_unchanged_logits_and_only_of_rows_that_ask() -> None:
    logits = torch.randn(4, 20)
    expected = torch.log_softmax(logits, -1)
    raw = RawScores(logits, [row(3), GREEDY, row(0), row(30)])
    logits.zero_()
    found = raw.of([5, 6, 7, 8])
    assert set(found) == {0, 2, 3}
    for i, token in ((0, 5), (2, 7), (3, 8)):
        assert math.isclose(found[i].logprob, float(expected[i, token]), abs_tol=1e-6)
    best = expected[0].topk(3)
    assert [token for token, _ in found[0].top] == best.indices.tolist()
    assert torch.allclose(torch.tensor([value for _, value in found[0].top]), best.values)
    assert found[2].top == ()
    assert len(found[3].top) == 20


def test_a_row_without_a_token_has_none_and_impossible_tokens_stay_within_json() -> None:
    logits = torch.zeros(2, 4)
    logits[:, 2] = -torch.inf
    found = RawScores(logits, [row(4), row(1)]).of([2, NO_TOKEN])
    assert set(found) == {0}
    assert found[0].logprob == LOGPROB_MIN
    assert found[0].top[-1] == (2, LOGPROB_MIN)


def test_nobody_asking_costs_nothing() -> None:
    assert RawScores(torch.zeros(2, 4), [GREEDY, row(None)]).of([1, 2]) == {}
