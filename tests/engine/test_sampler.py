from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prismserve.core.types import SamplingParams
from prismserve.engine import sampler
from prismserve.engine.sampler import (
    GREEDY,
    NO_TOKEN,
    SampleRow,
    TokenBias,
    TokenCounts,
    has_penalty,
    is_plain,
    sample,
    uniform,
)

VOCAB = 50


def row(index: int = 0, counts: TokenCounts | None = None, blocked: tuple[int, ...] = (), **params) -> SampleRow:
    return SampleRow(SamplingParams(**params), index, counts, blocked)


def naive_support(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Tokens that may be drawn, with their weights, worked out one by one."""
    top = max(logits)
    weights = [math.exp((x - top) / params.temperature) for x in logits]
    total = sum(weights)
    ranked = sorted(((w / total, -i) for i, w in enumerate(weights)), reverse=True)
    if params.top_k:
        ranked = ranked[: params.top_k]
    mass = sum(p for p, _ in ranked)
    kept, before = [], 0.0
    for p, negative in ranked:
        if kept and before >= params.top_p * mass:
            break
        kept.append((p, negative))
        before += p
    floor = params.min_p * kept[0][0]
    return {-negative: p for p, negative in kept if p >= floor}


def test_greedy_takes_the_most_likely_token_of_each_row() -> None:
    logits = torch.randn(7, VOCAB)
    assert sample(logits.clone(), [row() for _ in range(7)]) == logits.argmax(-1).tolist()


def test_random_numbers_depend_on_seed_and_index_alone_and_are_uniform() -> None:
    pairs = [(seed, index) for seed in (0, 1, -5, 2**63 - 1) for index in range(500)]
    draws = uniform([s for s, _ in pairs], [i for _, i in pairs])
    assert torch.equal(draws[700:701], uniform([pairs[700][0]], [pairs[700][1]]))
    assert draws.unique().numel() == 2000
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(float(draws.mean()) - 0.5) < 0.02
    counts = torch.histc(draws.float(), 10, 0, 1)
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 4, 49, 500]),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_draws_stay_within_what_the_restrictions_leave(seed, temperature, top_k, top_p, min_p) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    support = naive_support(logits[0].tolist(), params)
    tokens = sample(logits.expand(64, -1).clone(), [SampleRow(params, index) for index in range(64)])
    assert set(tokens) <= set(support)
    if len(support) == 1:
        assert set(tokens) == set(support)


@pytest.mark.parametrize("restriction", [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_frequencies_follow_the_probabilities(restriction) -> None:
    logits = torch.linspace(2.0, -2.0, 10)[torch.randperm(10, generator=torch.Generator().manual_seed(1))]
    params = SamplingParams(temperature=0.8, seed=11, **restriction)
    draws = 6000
    tokens = torch.tensor(sample(logits.expand(draws, -1).clone(), [SampleRow(params, i) for i in range(draws)]))
    support = naive_support(logits.tolist(), params)
    total = sum(support.values())
    for token, weight in support.items():
        share = float((tokens == token).float().mean())
        assert abs(share - weight / total) < 4 * math.sqrt(0.25 / draws)


def test_a_row_gets_the_same_token_whatever_else_is_in_the_batch() -> None:
    logits = torch.randn(6, VOCAB)
    counts = TokenCounts(VOCAB, [1, 2], [3, 3])
    rows = [
        row(4, temperature=1.0, seed=3),
        row(),
        row(9, temperature=0.7, top_p=0.9, seed=3),
        row(1, temperature=1.3, top_k=5, seed=8),
        row(2, counts, temperature=1.0, min_p=0.1, presence_penalty=1.0, seed=5),
        row(0, None, (7, 8), temperature=2.0, seed=1),
    ]
    together = sample(logits.clone(), rows)
    assert together == [sample(logits[i : i + 1].clone(), [rows[i]])[0] for i in range(6)]
    order = [5, 2, 0, 4, 1, 3]
    assert sample(logits[order].clone(), [rows[i] for i in order]) == [together[i] for i in order]


def test_penalties_follow_their_formulas() -> None:
    prompt, output = [3, 4, 4, 9], [4, 7, 7, 7]
    logits = torch.randn(VOCAB)
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.6, frequency_penalty=0.25)
    expected = []
    for token, value in enumerate(logits.tolist()):
        if token in prompt + output:
            value = value / 1.3 if value > 0 else value * 1.3  # noqa: PLW2901
        expected.append(value - 0.25 * output.count(token) - 0.6 * (token in output))
    counts = TokenCounts(VOCAB, prompt, output[:2])
    for token in output[2:]:
        counts.add(token)
    penalised = logits.clone()[None]
    sample(penalised, [SampleRow(params, 4, counts)])
    assert torch.allclose(penalised[0], torch.tensor(expected), atol=1e-6)


def test_only_requests_with_a_penalty_need_counts() -> None:
    assert not has_penalty(SamplingParams(temperature=1.0, top_p=0.5))
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", -0.5), ("frequency_penalty", 0.1)):
        assert has_penalty(SamplingParams(**{name: value}))


def test_a_blocked_token_is_never_chosen() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 7] = 50.0
    tokens = sample(logits, [row(blocked=(7,)), row(temperature=1.0, blocked=(7,)), row()])
    assert tokens[0] != 7
    assert tokens[1] != 7
    assert tokens[2] == 7


class StubMatcher:
    """Allows the tokens it was made with."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def fill(self, mask: torch.Tensor) -> None:
        for token in self.tokens:
            mask[token // 32] |= 1 << token % 32


def test_a_batch_of_plain_greedy_rows_is_one_argmax(monkeypatch) -> None:
    for step in ("_edit", "_draw_ordered", "_draw_unordered", "uniform"):
        monkeypatch.setattr(sampler, step, None)
    logits = torch.randn(5, VOCAB)
    assert sample(logits, [GREEDY] * 5) == logits.argmax(-1).tolist()


def test_only_greedy_requests_without_options_are_plain() -> None:
    assert is_plain(SamplingParams(max_tokens=5, stop=("x",), top_p=0.5))
    options = {"temperature": 1.0, "presence_penalty": 1.0, "logit_bias": ((1, 1.0),), "logprobs": 0}
    assert not any(is_plain(SamplingParams(**{name: value})) for name, value in options.items())


def test_bias_is_added_to_the_named_tokens_of_its_own_row() -> None:
    logits = torch.randn(3, VOCAB)
    biased = logits.clone()
    sample(biased, [row(), SampleRow(SamplingParams(), 0, bias=TokenBias([(3, 2.5), (49, -100.0)])), GREEDY])
    expected = logits.clone()
    expected[1, 3] += 2.5
    expected[1, 49] -= 100.0
    assert torch.equal(biased, expected)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 40, "top_p": 0.9}])
def test_only_allowed_tokens_are_chosen_and_bias_and_penalties_choose_among_them(params) -> None:
    allowed = (1, 33, 49)
    counts = TokenCounts(VOCAB, [33], [33])
    rows = [
        SampleRow(
            SamplingParams(seed=7, repetition_penalty=3.0, **params), index, counts, matcher=StubMatcher(*allowed)
        )
        for index in range(64)
    ]
    assert set(sample(torch.randn(64, VOCAB), rows)) <= set(allowed)
    forced = [SampleRow(r.params, r.index, None, (), TokenBias([(49, 90.0)]), r.matcher) for r in rows]
    assert set(sample(torch.randn(64, VOCAB), forced)) == {49}


def test_a_constraint_keeps_its_end_only_when_nothing_else_is_left() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 2] = 50.0
    rows = [SampleRow(SamplingParams(), 0, None, (2,), matcher=StubMatcher(*tokens)) for tokens in ((2, 9), (2,))]
    assert sample(logits, rows) == [9, 2]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_rows_without_a_finite_choice_get_no_token_and_others_theirs(params) -> None:
    logits = torch.randn(5, VOCAB)
    logits[0, 17] = math.nan
    logits[1, 17] = math.inf
    logits[2, :] = -math.inf
    made = [row(number, seed=3, **params) for number in range(5)]
    made[3] = SampleRow(made[3].params, 3, matcher=StubMatcher())
    tokens = sample(logits.clone(), made)
    assert tokens[:4] == [NO_TOKEN] * 4
    assert tokens[4:] == sample(logits[4:].clone(), made[4:])


def test_a_nan_behind_a_constraint_is_found(monkeypatch) -> None:
    logits = torch.randn(1, VOCAB)
    logits[0, 17] = math.nan
    assert sample(logits, [SampleRow(SamplingParams(), 0, matcher=StubMatcher(4))]) == [NO_TOKEN]


def test_the_largest_random_number_draws_a_token_that_has_weight(monkeypatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seeds, _: torch.ones(len(seeds), dtype=torch.float64))
    rows = [SampleRow(SamplingParams(temperature=1.0), 0, matcher=StubMatcher(3, 5))]
    assert sample(torch.randn(1, VOCAB), rows) == [5]


@pytest.mark.parametrize("extra", [{}, {"top_k": 3}])
def test_extreme_temperatures_and_logits_stay_finite(extra) -> None:
    logits = torch.full((1, VOCAB), -1e30)
    logits[0, 5] = 1e30
    assert sample(logits.clone(), [row(temperature=1e-30, **extra)]) == [5]
    assert sample(torch.randn(1, VOCAB), [row(temperature=1e30, **extra)])[0] in range(VOCAB)
