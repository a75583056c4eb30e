"""Choosing tokens from logits: vectorised over the batch, and independent of what else is in the batch.

Order of operations: constraint and blocked tokens, bias, repetition penalty, presence and frequency penalties,
temperature, top_k, top_p (over what top_k left, renormalised), min_p (relative to the most likely token). Token i of a request is drawn by
inverting the cumulative distribution at a number hashed from (seed, i), so a migrated request goes on with the same
stream. Rows with top_k or top_p are inverted in order of probability, others in order of token id; which of the two
depends on the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prismserve.core.types import SamplingParams
from prismserve.engine.constraints import allowed_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prismserve.engine.constraints import Matcher

_MASK_64 = (1 << 64) - 1
_UNIFORM_BITS = 48

NO_TOKEN = -1
"""In place of a token: the row's logits are no finite numbers, or nothing was left to choose from."""


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


class TokenBias:
    """What one request adds to the logits of some tokens."""

    def __init__(self, bias: Sequence[tuple[int, float]], device: torch.device | str = "cpu") -> None:
        """Keep (token id, bias) pairs of different tokens on ``device``."""
        self.ids = torch.tensor([token for token, _ in bias], dtype=torch.int64, device=device)
        self.values = torch.tensor([value for _, value in bias], dtype=torch.float32, device=device)


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
        blocked: token ids that must not be chosen now (end of sequence before ``min_tokens``), unless a constraint
            leaves no other.
        bias: of the request, if it has one.
        matcher: of the request's constraint, if it has one.
    """

    params: SamplingParams
    index: int
    counts: TokenCounts | None = None
    blocked: tuple[int, ...] = ()
    bias: TokenBias | None = None
    matcher: Matcher | None = None

    @property
    def edits(self) -> bool:
        """Whether the row's logits are changed before a token is chosen."""
        return bool(self.blocked) or any(part is not None for part in (self.counts, self.bias, self.matcher))


GREEDY = SampleRow(SamplingParams(), 0)
"""The row of every greedy request without further options; a batch of nothing else costs one argmax."""


def is_plain(params: SamplingParams) -> bool:
    """Whether the request is served by :data:`GREEDY` once it has its ``min_tokens``."""
    extras = params.logit_bias or params.logprobs is not None or params.constraint is not None
    return params.greedy and not extras and not has_penalty(params)


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Choose one token per row.

    Args:
        logits: [B, V] float32; may be changed in place.
        rows: B rows.

    Returns:
        B token ids, or :data:`NO_TOKEN`.
    """
    chosen = logits.argmax(dim=-1)
    sound = _finite(logits, chosen)  # argmax finds a NaN first
    special = [i for i, row in enumerate(rows) if row is not GREEDY]
    edited = [i for i in special if rows[i].edits]
    if edited:
        index = torch.tensor(edited, device=logits.device)
        part = _edit(logits[index], [rows[i] for i in edited])
        best = part.argmax(dim=-1)
        sound[index] &= _finite(part, best)
        chosen[index], logits[index] = best, part
    ordered = [i for i in special if not rows[i].params.greedy and _restricted(rows[i].params)]
    unordered = [i for i in special if not rows[i].params.greedy and not _restricted(rows[i].params)]
    for members, draw in ((ordered, _draw_ordered), (unordered, _draw_unordered)):
        if members:
            index = torch.tensor(members, device=logits.device)
            chosen[index] = draw(logits[index], [rows[i] for i in members])
    tokens: list[int] = torch.where(sound, chosen, NO_TOKEN).tolist()
    return tokens


def _finite(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, chosen[:, None])[:, 0].isfinite()


def _restricted(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _edit(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Apply what the rows add to or take from their logits; may change them in place."""
    if any(row.matcher is not None for row in rows):
        _constrain(logits, rows)
    if any(row.blocked for row in rows):
        _block(logits, rows)
    if any(row.bias is not None for row in rows):
        _bias(logits, rows)
    if any(row.counts is not None for row in rows):
        _penalise(logits, rows)
    return logits


def _constrain(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Leave the tokens the constraints allow; an answer that can only end may end early."""
    members = [(i, row.matcher, row.blocked) for i, row in enumerate(rows) if row.matcher is not None]
    allowed = allowed_tokens([matcher for _, matcher, _ in members], logits.shape[-1], logits.device)
    going_on = allowed.clone()
    for at, (_, _, blocked) in enumerate(members):
        if blocked:
            going_on[at, list(blocked)] = False
    allowed = torch.where(going_on.any(dim=-1, keepdim=True), going_on, allowed)
    index = torch.tensor([i for i, _, _ in members], device=logits.device)
    logits[index] = logits[index].masked_fill(~allowed, -torch.inf)


def _block(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    free = [(i, row.blocked) for i, row in enumerate(rows) if row.matcher is None]
    row_ids = [i for i, blocked in free for _ in blocked]
    token_ids = [token for _, blocked in free for token in blocked]
    logits[row_ids, token_ids] = -torch.inf


def _bias(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    members = [(i, row.bias) for i, row in enumerate(rows) if row.bias is not None]
    row_ids = torch.cat([torch.full_like(bias.ids, i) for i, bias in members])
    token_ids = torch.cat([bias.ids for _, bias in members])
    logits[row_ids, token_ids] += torch.cat([bias.values for _, bias in members])


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
    total = cumulative[:, -1:]
    # Rounding up to the total would pass the last token that has any weight.
    targets = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
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
