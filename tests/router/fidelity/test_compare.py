"""Two answers side by side: where they part and how far beliefs moved."""

from __future__ import annotations

import math

import pytest
import torch

from prismserve.core.types import TokenLogprobs
from prismserve.router.fidelity.compare import TOP_TOKENS, Answer, compare, divergence_nats


def answer(tokens, tops=None):
    tops = tops or [((token, -0.1),) for token in tokens]
    return Answer(tuple(tokens), tuple(TokenLogprobs(top[0][1], tuple(top)) for top in tops))


@pytest.mark.parametrize(
    ("exact", "compressed", "first"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 5, 3], 1),
        ([1, 2, 3], [9, 2, 3], 0),
        ([1, 2, 3], [1, 2], 2),
        ([1], [1, 2], 1),
        ([], [], None),
    ],
)
def test_the_first_token_that_differs_is_found_and_an_early_end_is_a_difference(exact, compressed, first):
    found = compare(answer(exact), answer(compressed))
    assert found.first_divergence == first
    assert found.agreed == (first is None)


def test_the_divergence_is_the_mean_over_the_shared_prefix_and_the_position_behind_it():
    sure, torn = ((1, math.log(0.9)), (2, math.log(0.1))), ((1, math.log(0.5)), (2, math.log(0.5)))
    gap = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    # Positions 0 and 1 are alike, 2 is where they part, 3 has another prefix and must not count.
    exact = answer([1, 1, 1, 1], [sure, sure, sure, sure])
    other = answer([1, 1, 2, 1], [sure, sure, torn, torn])
    found = compare(exact, other)
    assert found.first_divergence == 2
    assert found.kl_nats == pytest.approx(gap / 3)


def top(distribution, count):
    values, ids = distribution.log().topk(count)
    return list(zip(ids.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_likeliest_tokens_bound_the_whole_divergence_from_below_and_all_of_them_give_it(seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(50, generator=generator, dtype=torch.float64).mul(2).softmax(0) for _ in range(2))
    whole = float((p * (p / q).log()).sum())
    assert divergence_nats(top(p, 50), top(q, 50)) == pytest.approx(whole)
    assert 0.0 < divergence_nats(top(p, TOP_TOKENS), top(q, TOP_TOKENS)) <= whole + 1e-9
    assert divergence_nats(top(p, TOP_TOKENS), top(p, TOP_TOKENS)) == pytest.approx(0.0, abs=1e-9)


def test_distributions_with_no_likely_token_in_common_are_far_apart_and_finite():
    assert 5.0 < divergence_nats([(1, math.log(0.999))], [(2, math.log(0.999))]) < 50.0
