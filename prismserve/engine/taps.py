"""Attention scores of a few query rows, for methods that choose what to keep.

The fused attention of a step returns no scores. What a method needs is recomputed from the queries of the rows it
names and the keys in the cache, as softmax(q K^T / sqrt(d)) over what each row may see: the last row (R1), the last
rows (R2) or chosen ones (R3). That costs rows x context, and no context x context matrix ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from prismserve.core.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prismserve.engine.pool import KVPool
    from prismserve.engine.runner import RunItem
    from prismserve.models.decoder import AttentionBackend

ROWS_MAX = 256
"""Query rows one request may tap: bounds the scores kept to rows x heads x context in each tapped layer."""


def last_rows(tokens: int, rows: int = 1) -> tuple[int, ...]:
    """Slots of the last ``rows`` of a prompt of ``tokens`` cache slots (R1 with one row, R2 with more)."""
    return tuple(range(max(0, tokens - rows), tokens))


@dataclass(frozen=True, slots=True)
class TapScores:
    """What was tapped in one layer.

    Attributes:
        slots: [r] int64, the sequence's slots whose queries scored.
        probabilities: [r, heads, n] float32 over the layer's n cache slots; 0 where a row may not look.
        lse: [r, heads] float32, log-sum-exp of each row's scaled scores.
    """

    slots: torch.Tensor
    probabilities: torch.Tensor
    lse: torch.Tensor


@dataclass(slots=True, eq=False)
class Taps:
    """Which queries of one request to score in which layers, and what came of it.

    Given with a request and read once its first token is out; written by the engine thread only.

    Attributes:
        layers: decoder layers.
        slots: cache slots of the prompt whose queries score. They are computed even if a cache holds their KV.
    """

    layers: frozenset[int]
    slots: frozenset[int]
    _rows: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    @classmethod
    def at(cls, layers: Iterable[int], slots: Iterable[int]) -> Taps:
        """Tap these rows in these layers.

        Raises:
            InvalidRequestError: nothing, too many rows, or a negative number is named.
        """
        taps = cls(frozenset(layers), frozenset(slots))
        if not taps.layers or not 0 < len(taps.slots) <= ROWS_MAX or min(*taps.layers, *taps.slots, 0) < 0:
            message = f"a tap names at least one layer and 1 to {ROWS_MAX} query rows, counted from 0"
            raise InvalidRequestError(message, field="taps")
        return taps

    def first_slot(self, length: int) -> int:
        """The earliest tapped slot among the first ``length``; ``length`` if there is none."""
        return min((slot for slot in self.slots if slot < length), default=length)

    def scores(self, layer: int) -> TapScores:
        """What was tapped in a layer, rows in order of their slots; EngineError if nothing was."""
        rows = self._rows.get(layer)
        if not rows:
            message = f"no query row was tapped in layer {layer}"
            raise EngineError(message)
        slots = sorted(rows)
        width = max(rows[slot][0].shape[-1] for slot in slots)
        padded = [functional.pad(rows[slot][0], (0, width - rows[slot][0].shape[-1])) for slot in slots]
        return TapScores(torch.tensor(slots), torch.stack(padded), torch.stack([rows[slot][1] for slot in slots]))

    def take(self, layer: int, slots: Sequence[int], probabilities: torch.Tensor, lse: torch.Tensor) -> None:
        """Keep what ``slots`` gave in a layer; a later computation of the same slot replaces an earlier one."""
        kept = self._rows.setdefault(layer, {})
        for row, slot in enumerate(slots):
            kept[slot] = (probabilities[row], lse[row])


def score_rows(
    q: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention probabilities of a few query rows.

    Args:
        q: [r, heads, d], after RoPE.
        keys: [n, kv_heads, d], after RoPE.
        visible: [r] int64, leading cache slots each row sees, at least 1.
        scale: multiplies the scores.

    Returns:
        Probabilities [r, heads, n] and log-sum-exp [r, heads], both float32.
    """
    rows, heads, width = q.shape
    grouped = q.float().view(rows, keys.shape[1], -1, width)
    scores = torch.einsum("rgqd,ngd->rgqn", grouped, keys.float()).reshape(rows, heads, -1).mul_(scale)
    hidden = torch.arange(keys.shape[0], device=q.device) >= visible.to(q.device)[:, None]
    scores = scores.masked_fill_(hidden[:, None, :], -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return scores.sub_(lse[:, :, None]).exp_(), lse


class TappedAttention:
    """An attention backend that also scores tapped rows with the keys of whatever backend it wraps."""

    def __init__(self, inner: AttentionBackend, pool: KVPool, items: Sequence[RunItem]) -> None:
        """Score the tapped rows among ``items``, which are flattened in this order."""
        self._inner = inner
        self._pool = pool
        self._tapped: list[tuple[RunItem, Taps, int, list[int]]] = []
        first = 0
        for item in items:
            taps = item.sequence.taps
            if taps is not None:
                slots = sorted(slot for slot in taps.slots if item.start <= slot < item.start + item.tokens)
                if slots:
                    self._tapped.append((item, taps, first, slots))
            first += item.tokens

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As the wrapped backend does."""
        out = self._inner.attend(layer, q, k, v)
        for item, taps, first, slots in self._tapped:
            if layer in taps.layers:
                ragged = item.sequence.ragged
                before = item.start if ragged is None else ragged[layer].tokens
                total = before + item.tokens
                if ragged is None:
                    keys, _ = self._pool.read(layer, item.sequence.table, 0, total)
                else:
                    keys, _ = self._pool.read_blocks(ragged[layer].blocks, 0, total)
                rows = torch.tensor([first + slot - item.start for slot in slots], device=q.device)
                visible = torch.tensor([before + slot - item.start + 1 for slot in slots])
                taps.take(layer, slots, *score_rows(q[rows], keys, visible, self._pool.layout.head_dim**-0.5))
        return out


def tapped(items: Sequence[RunItem]) -> bool:
    """Whether any of the items has rows to score."""
    return any(item.sequence.taps is not None for item in items)
