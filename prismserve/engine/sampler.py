"""Choosing tokens from logits: vectorised over the batch, and independent of what else is in the batch.

Order of operations: blocked tokens, repetition penalty, presence and frequency penalties, temperature, top_k, top_p
(over what top_k left, renormalised), min_p (relative to the most likely token). Token i of a request is drawn by
inverting the cumulative distribution at a number hashed from (seed, i), so a migrated request goes on with the same
stream. Rows with top_k or top_p are inverted in order of probability, others in order of token id; which of the two
depends on the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prismserve.core.types import SamplingParams

_MASK_64 = (1 << 64) - 1
_UNIFORM_BITS = 48


def _signed(value: int) -> int:
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); int64 arithmetic wraps."""
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


def uniform(seeds: Sequence[int], indices: Sequence[int]) -> torch.Tensor:
    """Numbers in [0, 1) that depend on (seed, index) only: [B] float64 on the CPU, 48 random bits each."""
    base = _mix(torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64) + _GAMMA)
    state = _mix(base + torch.tensor(indices, dtype=torch.int64) * _GAMMA)
    return _shift_right(state, 64 - _UNIFORM_BITS).double() * 2.0**-_UNIFORM_BITS


class TokenCounts:
    """Which tokens one request has seen and produced; kept only for requests with a penalty."""

    def __init__(
        self, vocab_size: int, prompt_ids: Iterable[int], output_ids: Iterable[int], device: torch.device | str = "cpu"
    ) -> None:
        """Count the prompt's text tokens and the tokens produced so far."""
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.output = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        outputs = torch.tensor(list(output_ids), dtype=torch.int64, device=device)
        self.seen[torch.tensor(list(prompt_ids), dtype=torch.int64, device=device)] = True
        self.seen[outputs] = True
        self.output.index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.float32))

    def add(self, token: int) -> None:
        """Count a produced token."""
        self.seen[token] = True
        self.output[token] += 1


def has_penalty(params: SamplingParams) -> bool:
    """Whether the request needs :class:`TokenCounts`."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How to choose the token of one row of logits.

    Attributes:
        params: the request's.
        index: number of tokens generated before this one, over all attempts.
        counts: needed if the request has a penalty.
        blocked: token ids that must not be chosen now (end of sequence before ``min_tokens``).
    """

    params: SamplingParams
    index: int
    counts: TokenCounts | None = None
    blocked: tuple[int, ...] = ()


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Choose one token per row.

    Args:
        logits: [B, V] float32; may be changed in place.
        rows: B rows.

    Returns:
        B token ids.
    """
    if any(row.blocked for row in rows):
        _block(logits, rows)
    if any(row.counts is not None for row in rows):
        _penalise(logits, rows)
    chosen = logits.argmax(dim=-1)
    ordered = [i for i, row in enumerate(rows) if not row.params.greedy and _restricted(row.params)]
    unordered = [i for i, row in enumerate(rows) if not row.params.greedy and not _restricted(row.params)]
    for members, draw in ((ordered, _draw_ordered), (unordered, _draw_unordered)):
        if members:
            index = torch.tensor(members, device=logits.device)
            chosen[index] = draw(logits[index], [rows[i] for i in members])
    tokens: list[int] = chosen.tolist()
    return tokens


def _restricted(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _block(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    row_ids = [i for i, row in enumerate(rows) for _ in row.blocked]
    token_ids = [token for row in rows for token in row.blocked]
    logits[row_ids, token_ids] = -torch.inf


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]


def _penalise(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Repetition (CTRL, arXiv:1909.05858, section 4.1) over prompt and output; presence and frequency over output."""
    members = [(i, row.params, row.counts) for i, row in enumerate(rows) if row.counts is not None]
    index = torch.tensor([i for i, _, _ in members], device=logits.device)
    part = logits[index]
    seen = torch.stack([counts.seen for _, _, counts in members])
    output = torch.stack([counts.output for _, _, counts in members])
    repetition = _column([params.repetition_penalty for _, params, _ in members], logits.device)
    presence = _column([params.presence_penalty for _, params, _ in members], logits.device)
    frequency = _column([params.frequency_penalty for _, params, _ in members], logits.device)
    part = torch.where(seen, torch.where(part > 0, part / repetition, part * repetition), part)
    part = part - frequency * output - presence * (output > 0)
    logits[index] = part


def _probabilities(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    # The maximum goes first so that a tiny temperature cannot overflow to inf - inf.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return torch.softmax(shifted / _column([row.params.temperature for row in rows], logits.device), dim=-1)


def _invert(weights: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """[B] position at which the cumulative weights pass each row's random number."""
    cumulative = weights.double().cumsum(dim=-1)
    draws = uniform([row.params.seed for row in rows], [row.index for row in rows]).to(weights.device)
    targets = draws[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _min_p(weights: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    floor = _column([row.params.min_p for row in rows], weights.device) * weights.amax(dim=-1, keepdim=True)
    return weights.masked_fill(weights < floor, 0.0)


def _draw_unordered(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    return _invert(_min_p(_probabilities(logits, rows), rows), rows)


def _draw_ordered(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    vocabulary = logits.shape[-1]
    weights, order = _probabilities(logits, rows).sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([row.params.top_k or vocabulary for row in rows], device=logits.device)[:, None]
    weights = weights.masked_fill(torch.arange(vocabulary, device=logits.device) >= top_k, 0.0)
    before = weights.double().cumsum(dim=-1) - weights
    mass = weights.double().sum(dim=-1, keepdim=True)
    top_p = torch.tensor([row.params.top_p for row in rows], dtype=torch.float64, device=logits.device)[:, None]
    cut = before >= top_p * mass
    cut[:, 0] = False
    weights = _min_p(weights.masked_fill(cut, 0.0), rows)
    return order.gather(1, _invert(weights, rows)[:, None])[:, 0]
