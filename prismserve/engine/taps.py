"""What methods that choose tokens may ask of the attention of one request, without leaving fused attention.

The fused attention of a step returns no scores. What a method needs is recomputed from the queries of the rows it names
and the keys in the cache:

- rows of the attention matrix, softmax(q K^T / sqrt(d)) over what each row may see: the last row (R1), the last rows
  (R2) or chosen ones (R3), at rows x context;
- the attention every slot receives from all or some rows (R4), by tiles of rows;
- scores before softmax summed over rows (R5), at the price of one row;
- the queries of chosen rows, and the hidden states that enter the layer there.

No context x context matrix ever exists. Over a quantised pool, scores are taken before quantising: the exact keys of the
tapped layers are kept while the prompt is computed, which it then is from its first token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from prismserve.core.errors import EngineError, InvalidRequestError
from prismserve.engine.scoring import received_sums, score_rows, summed_scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "ROWS_MAX",
    "ColumnSums",
    "TapRows",
    "TapScores",
    "Taps",
    "last_rows",
    "received_sums",
    "score_rows",
    "spread_rows",
    "summed_scores",
]

ROWS_MAX = 256
"""Query rows one request may tap: bounds the scores kept to rows x heads x context in each tapped layer."""


def last_rows(tokens: int, rows: int = 1) -> tuple[int, ...]:
    """Slots of the last ``rows`` of a prompt of ``tokens`` cache slots (R1 with one row, R2 with more)."""
    return tuple(range(max(0, tokens - rows), tokens))


def spread_rows(tokens: int, rows: int) -> tuple[int, ...]:
    """``rows`` slots evenly spread over a prompt, its last among them: a reproducible sample for R4."""
    count = max(0, min(tokens, rows))
    return tuple((index + 1) * tokens // count - 1 for index in range(count))


@dataclass(frozen=True, slots=True)
class TapScores:
    """Rows of one layer's attention.

    Attributes:
        slots: [r] int64, the sequence's slots whose queries scored.
        probabilities: [r, heads, n] float32 over the layer's n cache slots; 0 where a row may not look.
        lse: [r, heads] float32, log-sum-exp of each row's scaled scores.
    """

    slots: torch.Tensor
    probabilities: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True, slots=True)
class ColumnSums:
    """One layer's attention summed over rows.

    Attributes:
        sums: [heads, n] float32 over the layer's n cache slots, those of the prompt that are left.
        rows: how many rows were summed.
    """

    sums: torch.Tensor
    rows: int


@dataclass(frozen=True, slots=True)
class TapRows:
    """What enters one layer's attention in chosen rows.

    Attributes:
        slots: [r] int64, the sequence's slots.
        inputs: [r, D], hidden states that enter the layer, before its norm; in the model's dtype.
        queries: [r, heads, d], after RoPE, in the model's dtype.
    """

    slots: torch.Tensor
    inputs: torch.Tensor
    queries: torch.Tensor


@dataclass(slots=True)
class _Layer:
    """What one layer has given so far."""

    scores: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    received: torch.Tensor | None = None
    received_rows: int = 0
    query_sum: torch.Tensor | None = None
    summed: torch.Tensor | None = None
    summed_rows: int = 0
    keys: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class Taps:
    """What to look at in the prompt of one request, and what came of it.

    Given with a request and read once its first token is out; a layer's scores may be read as soon as the layer has
    computed the last row in question. Written by the engine thread only. A request that is preempted before its first
    token starts over, taps included.

    Attributes:
        layers: decoder layers.
        slots: cache slots of the prompt whose queries score (R1 to R3).
        received: cache slots whose attention is summed over columns (R4).
        summed: cache slots whose scores before softmax are summed (R5).
        rows: cache slots whose query and layer input are kept.

    All these slots are computed even if a cache holds their KV.
    """

    layers: frozenset[int]
    slots: frozenset[int]
    received: frozenset[int] = frozenset()
    summed: frozenset[int] = frozenset()
    rows: frozenset[int] = frozenset()
    finished: bool = False
    exact_keys: bool = False
    length: int = 0
    _states: dict[int, _Layer] = field(default_factory=dict)

    @classmethod
    def at(
        cls,
        layers: Iterable[int],
        slots: Iterable[int] = (),
        *,
        received: Iterable[int] = (),
        summed: Iterable[int] = (),
        rows: Iterable[int] = (),
    ) -> Taps:
        """Tap these layers; see the attributes.

        Raises:
            InvalidRequestError: nothing, too many scored or kept rows, or a negative number is named.
        """
        taps = cls(frozenset(layers), frozenset(slots), frozenset(received), frozenset(summed), frozenset(rows))
        wanted = taps.all_slots
        few = max(len(taps.slots), len(taps.rows)) <= ROWS_MAX
        if not taps.layers or not wanted or not few or min(*taps.layers, *wanted, 0) < 0:
            message = f"a tap names at least one layer and 1 to {ROWS_MAX} query rows, counted from 0"
            raise InvalidRequestError(message, field="taps")
        return taps

    @property
    def all_slots(self) -> frozenset[int]:
        """Every cache slot that is looked at in some way."""
        return self.slots | self.received | self.summed | self.rows

    def first_slot(self, length: int) -> int:
        """The earliest slot among the first ``length`` that must be computed; ``length`` if there is none."""
        if self.finished:
            return length
        return 0 if self.exact_keys else min((slot for slot in self.all_slots if slot < length), default=length)

    # ---- results ---------------------------------------------------------------------------------------------

    def scores(self, layer: int) -> TapScores:
        """Tapped rows of a layer's attention, in order of their slots; EngineError if there are none."""
        rows = self._state(layer).scores
        slots = self._named(rows, layer)
        width = max(rows[slot][0].shape[-1] for slot in slots)
        padded = [functional.pad(rows[slot][0], (0, width - rows[slot][0].shape[-1])) for slot in slots]
        return TapScores(torch.tensor(slots), torch.stack(padded), torch.stack([rows[slot][1] for slot in slots]))

    def received_sums(self, layer: int) -> ColumnSums:
        """What each slot of a layer received from the rows of ``received``; EngineError if none was computed."""
        state = self._state(layer)
        if state.received is None:
            raise _nothing(layer)
        return ColumnSums(state.received, state.received_rows)

    def summed_scores(self, layer: int) -> ColumnSums:
        """Scores before softmax summed over the rows of ``summed``; EngineError before the prompt is computed.

        Pairs that the causal mask hides are part of the sums.
        """
        state = self._state(layer)
        if state.summed is None:
            raise _nothing(layer)
        return ColumnSums(state.summed, state.summed_rows)

    def kept_rows(self, layer: int) -> TapRows:
        """Queries and layer inputs of the slots of ``rows``; EngineError if there are none."""
        state = self._state(layer)
        slots = self._named(state.queries, layer)
        inputs, queries = (torch.stack([kept[slot] for slot in slots]) for kept in (state.inputs, state.queries))
        return TapRows(torch.tensor(slots), inputs, queries)

    # ---- recording: the engine thread ------------------------------------------------------------------------

    def begin(self, length: int, *, exact_keys: bool) -> None:
        """The request is submitted with ``length`` slots to compute, over a pool that does or does not round keys."""
        self.length = length
        self.exact_keys = exact_keys

    def advance(self, cached: int) -> None:
        """``cached`` slots are computed: after the last of the prompt nothing is recorded any more."""
        if not self.finished and cached >= self.length:
            self.finished = True
            for state in self._states.values():
                state.keys = state.query_sum = None

    def reset(self) -> None:
        """The prompt is computed again from its start."""
        if not self.finished:
            self._states = {}

    def compact(self, layer: int, keep: torch.Tensor) -> None:
        """The layer keeps the slots of ``keep`` ([1 or kv_heads, k] int64) and no others."""
        state = self._states.get(layer)
        if state is None or self.finished:
            return
        if state.keys is not None:
            heads, width = state.keys.shape[1:]
            index = keep.expand(heads, -1).T[:, :, None].expand(-1, -1, width).to(state.keys.device)
            state.keys = state.keys.gather(0, index)
        if state.received is not None:
            index = keep.repeat_interleave(state.received.shape[0] // keep.shape[0], dim=0)
            state.received = state.received.gather(1, index.to(state.received.device))

    def whole_keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """Append a chunk's exact keys; those of the layer so far, [n, kv_heads, d]."""
        state = self._states.setdefault(layer, _Layer())
        state.keys = keys.clone() if state.keys is None else torch.cat((state.keys, keys))
        return state.keys

    def take(self, layer: int, slots: Sequence[int], probabilities: torch.Tensor, lse: torch.Tensor) -> None:
        """Keep the scores that ``slots`` gave in a layer; a later computation of the same slot replaces an earlier."""
        kept = self._states.setdefault(layer, _Layer()).scores
        for row, slot in enumerate(slots):
            kept[slot] = (probabilities[row], lse[row])

    def take_inputs(self, layer: int, slots: Sequence[int], inputs: torch.Tensor) -> None:
        """Keep what enters a layer, [r, D]."""
        self._states.setdefault(layer, _Layer()).inputs.update(zip(slots, inputs.unbind(), strict=True))

    def take_queries(self, layer: int, slots: Sequence[int], queries: torch.Tensor) -> None:
        """Keep queries of a layer, [r, heads, d]."""
        self._states.setdefault(layer, _Layer()).queries.update(zip(slots, queries.unbind(), strict=True))

    def add_received(self, layer: int, rows: int, sums: torch.Tensor) -> None:
        """Add what ``rows`` rows gave, [heads, n] over the slots so far."""
        state = self._states.setdefault(layer, _Layer())
        if state.received is not None:
            sums[:, : state.received.shape[1]] += state.received
        state.received = sums
        state.received_rows += rows

    def add_queries(self, layer: int, queries: torch.Tensor) -> None:
        """Add up queries, [r, heads, d]."""
        state = self._states.setdefault(layer, _Layer())
        total = queries.float().sum(dim=0)
        state.query_sum = total if state.query_sum is None else state.query_sum + total
        state.summed_rows += queries.shape[0]

    def close_sums(self, layer: int, keys: torch.Tensor, scale: float) -> None:
        """The prompt is computed in this layer, whose keys are given: [n, kv_heads, d]."""
        state = self._states.get(layer)
        if state is None:
            return
        if state.query_sum is not None:
            state.summed = summed_scores(state.query_sum, keys, scale)
        if state.received is not None:
            state.received = functional.pad(state.received, (0, keys.shape[0] - state.received.shape[1]))

    def _state(self, layer: int) -> _Layer:
        state = self._states.get(layer)
        if state is None:
            raise _nothing(layer)
        return state

    @staticmethod
    def _named(kept: Mapping[int, object], layer: int) -> list[int]:
        if not kept:
            raise _nothing(layer)
        return sorted(kept)


def _nothing(layer: int) -> EngineError:
    return EngineError(f"nothing of the kind was tapped in layer {layer}")
