"""Two greedy answers to one prompt, with and without compression: where they part, and how far the model's belief moved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prismserve.core.types import TokenLogprobs

TOP_TOKENS: Final = 20
"""Likeliest tokens whose log-probabilities are compared at each position."""
_SMALLEST: Final = 1e-9
"""Log-probabilities are of 32 bits: what is left of 1 is not known any better."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens of one greedy answer, the one that ended it included, and ``TOP_TOKENS`` log-probabilities at each."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What compression changed.

    Attributes:
        first_divergence: index of the first token that differs, or at which one answer has ended; None if none does.
        kl_nats: mean over the positions both answers reached with the same tokens before them, the one of the divergence
            included, of the Kullback-Leibler divergence of the next-token distribution with compression from the one
            without it, in nats; only the likeliest tokens are known, so it is a lower bound.
    """

    first_divergence: int | None
    kl_nats: float

    @property
    def agreed(self) -> bool:
        """Whether the answers are the same."""
        return self.first_divergence is None


def compare(exact: Answer, compressed: Answer) -> Comparison:
    """Compare two answers; positions without log-probabilities count for the tokens alone."""
    pairs = zip(exact.token_ids, compressed.token_ids, strict=False)
    divergence = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    shortest = min(len(exact.token_ids), len(compressed.token_ids))
    if divergence is None and len(exact.token_ids) != len(compressed.token_ids):
        divergence = shortest
    shared = shortest if divergence is None else min(shortest, divergence + 1)
    steps = list(zip(exact.logprobs[:shared], compressed.logprobs[:shared], strict=False))
    total = sum(divergence_nats(one.top, other.top) for one, other in steps)
    return Comparison(divergence, total / len(steps) if steps else 0.0)


def divergence_nats(exact: Sequence[tuple[int, float]], compressed: Sequence[tuple[int, float]]) -> float:
    """KL divergence of two distributions of which only the likeliest tokens are known; at most what it really is.

    The tokens are divided into those of both lists, each by itself, those of the first list alone, and all others. What
    the second distribution gives to tokens of the first list alone is not known, but it is no more than what its own
    list leaves; of what is possible, the share that makes the divergence least is taken.

    Args:
        exact: (token id, log-probability) of the reference, p.
        compressed: the same of the other, q.

    Returns:
        Nats, at least 0.
    """
    other = dict(compressed)
    common = [(log_p, other[token]) for token, log_p in exact if token in other]
    alone = math.fsum(math.exp(log_p) for token, log_p in exact if token not in other)
    tail_p = _left(log_p for _, log_p in exact)
    tail_q = _left(log_q for _, log_q in compressed)
    free_q = _left(log_q for _, log_q in common)
    alone_q = min(tail_q, free_q * alone / (alone + tail_p)) if alone + tail_p else 0.0
    total = math.fsum(math.exp(log_p) * (log_p - log_q) for log_p, log_q in common)
    return max(0.0, total + _term(alone, alone_q) + _term(tail_p, free_q - alone_q))


def _left(logarithms: Iterable[float]) -> float:
    """What probabilities leave of 1."""
    return max(0.0, 1.0 - math.fsum(math.exp(value) for value in logarithms))


def _term(p: float, q: float) -> float:
    return p * math.log(p / max(q, _SMALLEST)) if p > _SMALLEST else 0.0
