"""An attention backend that serves the taps of a step's requests beside the attention of whatever it wraps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prismserve.core.errors import EngineError
from prismserve.engine.scoring import received_sums, score_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from prismserve.engine.pool import KVPool
    from prismserve.engine.run_item import RunItem
    from prismserve.engine.taps import Taps
    from prismserve.models.config import DecoderConfig
    from prismserve.models.decoder import AttentionBackend

    AttendWithLse: TypeAlias = Callable[
        [int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
    ]


@dataclass(frozen=True, slots=True)
class _Tapped:
    """One item with open taps.

    Attributes:
        item: what is computed of its sequence.
        taps: of the sequence.
        first: the item's first row in the step.
        scored: slots of the item by what is wanted of them.
        received: likewise.
        summed: likewise.
        rows: likewise.
    """

    item: RunItem
    taps: Taps
    first: int
    scored: list[int]
    received: list[int]
    summed: list[int]
    rows: list[int]

    def places(self, slots: Sequence[int], device: torch.device) -> torch.Tensor:
        """Rows of the step that compute these slots."""
        return torch.tensor([self.first + slot - self.item.start for slot in slots], device=device)

    @property
    def last(self) -> bool:
        """Whether the prompt is computed with this step."""
        return self.item.start + self.item.tokens >= self.taps.length


class TappedAttention:
    """Attends as the wrapped backend does, and records what the taps ask for."""

    def __init__(
        self,
        inner: AttentionBackend,
        pool: KVPool,
        items: Sequence[RunItem],
        config: DecoderConfig,
        with_lse: AttendWithLse | None = None,
    ) -> None:
        """Serve the taps among ``items``, which are flattened in this order.

        Args:
            inner: attends.
            pool: where the keys are.
            items: what the step computes.
            config: says who may see whom.
            with_lse: attends and returns the log-sum-exp of every row; where given, column sums are made with it.
        """
        self._inner = inner
        self._pool = pool
        self._config = config
        self._with_lse = with_lse
        self._scale = pool.layout.head_dim**-0.5
        self._tapped: list[_Tapped] = []
        first = 0
        for item in items:
            taps = item.sequence.taps
            if taps is not None and not taps.finished:
                end = min(item.start + item.tokens, taps.length)
                wanted = [
                    sorted(slot for slot in slots if item.start <= slot < end)
                    for slots in (taps.slots, taps.received, taps.summed, taps.rows)
                ]
                self._tapped.append(_Tapped(item, taps, first, *wanted))
            first += item.tokens

    def enter(self, layer: int, x: torch.Tensor) -> None:
        """Hidden states [T, D] enter a layer."""
        for tapped in self._tapped:
            if tapped.rows and layer in tapped.taps.layers:
                tapped.taps.take_inputs(layer, tapped.rows, x[tapped.places(tapped.rows, x.device)])

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As the wrapped backend does."""
        here = [tapped for tapped in self._tapped if layer in tapped.taps.layers]
        lse: torch.Tensor | None = None
        if self._with_lse is not None and any(tapped.received for tapped in here):
            out, lse = self._with_lse(layer, q, k, v)
        else:
            out = self._inner.attend(layer, q, k, v)
        for tapped in here:
            self._record(tapped, layer, q, k, lse)
        return out

    def _record(self, tapped: _Tapped, layer: int, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None) -> None:
        taps = tapped.taps
        keys = self._keys(tapped, layer, k)
        if tapped.rows:
            taps.take_queries(layer, tapped.rows, q[tapped.places(tapped.rows, q.device)])
        if tapped.summed:
            taps.add_queries(layer, q[tapped.places(tapped.summed, q.device)])
        if keys is None:
            return
        if tapped.scored:
            visible, first = self._sight(tapped, layer, tapped.scored)
            rows = q[tapped.places(tapped.scored, q.device)]
            taps.take(layer, tapped.scored, *score_rows(rows, keys, visible, self._scale, first))
        if tapped.received:
            visible, first = self._sight(tapped, layer, tapped.received)
            places = tapped.places(tapped.received, q.device)
            known = None if lse is None else lse[places]
            sums = received_sums(q[places], keys, visible, self._scale, first, known)
            taps.add_received(layer, len(tapped.received), sums)
        if tapped.last:
            taps.close_sums(layer, keys, self._scale)

    def _before(self, tapped: _Tapped, layer: int) -> int:
        """Slots the layer held before this step."""
        ragged = tapped.item.sequence.ragged
        return tapped.item.start if ragged is None else ragged[layer].tokens

    def _keys(self, tapped: _Tapped, layer: int, k: torch.Tensor) -> torch.Tensor | None:
        """The layer's keys up to the end of the step, [n, kv_heads, d]; None if nothing needs them."""
        item, sequence = tapped.item, tapped.item.sequence
        total = self._before(tapped, layer) + item.tokens
        if tapped.taps.exact_keys:
            keys = tapped.taps.whole_keys(layer, k[tapped.first : tapped.first + item.tokens])
            if keys.shape[0] != total:
                message = f"{keys.shape[0]} exact keys are held of the {total} slots of layer {layer}"
                raise EngineError(message, request_id=sequence.request.request_id)
            return keys
        if not (tapped.scored or tapped.received or tapped.last):
            return None
        if sequence.ragged is None:
            return self._pool.read(layer, sequence.table, 0, total)[0]
        return self._pool.read_blocks(sequence.ragged[layer].blocks, 0, total)[0]

    def _sight(self, tapped: _Tapped, layer: int, slots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One past the last slot each row sees, and the first where that is not slot 0."""
        item, sequence = tapped.item, tapped.item.sequence
        shift = self._before(tapped, layer) - item.start
        ends = [slot + 1 for slot in slots]
        if self._config.bidirectional_images:
            images = sequence.images_within(item.start, item.start + item.tokens)
            ends = [
                next((last for start, last in images if start <= slot < last), end)
                for slot, end in zip(slots, ends, strict=True)
            ]
        window = self._config.windows[layer] if self._config.windows else 0
        first = torch.tensor([max(0, slot + 1 - window) for slot in slots]) if window else None
        return torch.tensor(ends) + shift, first


def tapped(items: Sequence[RunItem]) -> bool:
    """Whether any of the items has taps that still record."""
    return any(item.sequence.taps is not None and not item.sequence.taps.finished for item in items)
