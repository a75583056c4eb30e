"""An attention backend whose decoding rows read, from some layer on, the cache slots that were chosen for them.

A choice names single slots, and a block holds several. To the kernels a layer is shown as blocks of one slot each
(:func:`prismserve.kernels.paged_cache.by_slot`), so they read the chosen ones where they lie and nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prismserve.engine.scoring import score_rows
from prismserve.kernels.dispatch import use_native
from prismserve.kernels.paged_attention import attend, plan_batch, write_kv
from prismserve.kernels.paged_cache import by_slot, slot_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prismserve.engine.focusing import Focusing
    from prismserve.engine.pool import KVPool
    from prismserve.engine.run_item import RunItem
    from prismserve.kernels.paged_attention import PagedBatch
    from prismserve.models.decoder import AttentionBackend


@dataclass(frozen=True, slots=True)
class _Focused:
    """One decoding row.

    Attributes:
        item: whose row it is.
        focusing: of its sequence.
        row: of the step.
    """

    item: RunItem
    focusing: Focusing
    row: int


@dataclass(frozen=True, slots=True)
class _Apart:
    """A step whose rows are attended in two parts.

    Attributes:
        rows: [F] int64 that read what was chosen for them.
        slots: [F] int64, where their own keys and values go.
        batch: over blocks of one slot.
        others: attends the other rows; None if there are none.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    batch: PagedBatch
    others: AttentionBackend | None


class FocusedAttention:
    """Attends as the wrapped backend does below the first layer that reads a choice, and in two parts from there on."""

    def __init__(
        self,
        inner: AttentionBackend,
        pool: KVPool,
        items: Sequence[RunItem],
        slots: torch.Tensor,
        attention_of: Callable[[Sequence[RunItem], torch.Tensor], AttentionBackend],
    ) -> None:
        """Serve the decoding rows among ``items``.

        Args:
            inner: attends all rows.
            pool: where the keys are.
            items: what the step computes, flattened in this order.
            slots: [T] int64, ``group * block_tokens + offset`` of each row.
            attention_of: a backend for some of the items, with the slots of their rows.
        """
        self._inner = inner
        self._pool = pool
        self._items = items
        self._slots = slots
        self._attention_of = attention_of
        self._scale = pool.layout.head_dim**-0.5
        self._focused: list[_Focused] = []
        self._apart: dict[int, _Apart] = {}
        row = 0
        for item in items:
            if focuses(item) and item.sequence.focusing is not None:
                self._focused.append(_Focused(item, item.sequence.focusing, row))
            row += item.tokens
        self._focused.sort(key=lambda focused: focused.focusing.layer)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As the wrapped backend does, but for rows that read what was chosen for them."""
        reading = sum(focused.focusing.layer <= layer for focused in self._focused)
        out = self._in_parts(layer, reading, q, k, v) if reading else self._inner.attend(layer, q, k, v)
        for focused in self._focused:
            if focused.focusing.layer == layer + 1:
                self._look(focused, layer, q[focused.row])
        return out

    def _look(self, focused: _Focused, layer: int, q: torch.Tensor) -> None:
        """Show a row's attention, [H, d] after RoPE, to the method."""
        length = focused.item.start + 1
        keys, _ = self._pool.read(layer, focused.item.sequence.table, 0, length)
        probabilities, _ = score_rows(q[None], keys, torch.tensor([length]), self._scale)
        focused.focusing.look(probabilities[0].mean(0))

    def _in_parts(self, layer: int, reading: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend with the first ``reading`` of the focused rows apart from the others."""
        if reading not in self._apart:
            self._apart[reading] = self._split(self._focused[:reading])
        apart, view = self._apart[reading], self._pool.layer(layer)
        out = torch.empty_like(q)
        q_, k_, v_ = (self._as_read(side[apart.rows]) for side in (q, k, v))
        write_kv(view, apart.slots, k_, v_)
        out[apart.rows] = attend(q_, by_slot(view), apart.batch, self._scale).to(q.dtype)
        if apart.others is not None:
            rest = torch.ones(q.shape[0], dtype=torch.bool, device=q.device)
            rest[apart.rows] = False
            out[rest] = apart.others.attend(layer, q[rest], k[rest], v[rest])
        return out

    def _as_read(self, part: torch.Tensor) -> torch.Tensor:
        return part if use_native(part) else part.to(self._pool.memory.dtype)

    def _split(self, reading: Sequence[_Focused]) -> _Apart:
        size, device = self._pool.block_tokens, self._pool.device
        rows = torch.tensor([focused.row for focused in reading], dtype=torch.int64, device=device)
        view = self._pool.layer(0)
        tables: list[list[int]] = []
        for focused in reading:
            table = focused.item.sequence.table
            slots = [
                table[slot // size] * size + slot % size for slot in focused.focusing.slots(focused.item.start + 1)
            ]
            tables.append(slot_blocks(view, slots))
        lengths = [len(table) for table in tables]
        batch = plan_batch(tables, [1] * len(tables), lengths, 1, device)
        apart = {id(focused.item) for focused in reading}
        others = [item for item in self._items if id(item) not in apart]
        backend = None
        if others:
            rest = torch.ones(self._slots.shape[0], dtype=torch.bool, device=device)
            rest[rows] = False
            backend = self._attention_of(others, self._slots[rest])
        return _Apart(rows, self._slots[rows], batch, backend)


def focuses(item: RunItem) -> bool:
    """Whether an item is a step of decoding under a method that chooses what it reads."""
    return item.sequence.focusing is not None and item.tokens == 1 and item.start >= item.sequence.prompt_tokens
