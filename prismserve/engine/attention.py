"""Attention of one step over the KV pool: the decoder's view of the paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prismserve.kernels.dispatch import use_native
from prismserve.kernels.layer_stack import STORABLE
from prismserve.kernels.paged_attention import attend, attend_with_lse, plan_batch, write_kv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.engine.pool import KVPool
    from prismserve.engine.ragged import LayerTable
    from prismserve.kernels.layer_stack import LayerStack
    from prismserve.kernels.paged_attention import PagedBatch
    from prismserve.kernels.paged_cache import LayerKV


class PagedAttention:
    """Writes the step's keys and values into the pool and attends over each sequence's blocks.

    Made once per step. Uniform sequences share one table over all layers, so one plan serves every layer; ragged ones
    come after them in the batch and are planned layer by layer.
    """

    def __init__(
        self,
        pool: KVPool,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        slots: torch.Tensor,
        ragged: Sequence[tuple[Sequence[LayerTable], Sequence[int]]] = (),
    ) -> None:
        """Plan one step.

        Args:
            pool: where the blocks are.
            tables: groups of each uniform sequence.
            starts: cache slots each of them held before this step.
            counts: tokens of each of them in this step, flattened in this order.
            slots: [T] int64, ``group * block_tokens + offset`` of each token; those of ragged sequences are not read.
            ragged: tables by layer, as they are before this step, and tokens by layer of each ragged sequence,
                flattened after the uniform ones; a layer's tokens are looked at when it is attended to.
        """
        self._pool = pool
        self._ragged = ragged
        self._rows = sum(counts)
        self._slots = slots[: self._rows]
        self._scale = pool.layout.head_dim**-0.5
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self._batch = plan_batch(tables, counts, ends, pool.block_tokens, pool.device)

    def stacks(self) -> bool:
        """Whether :meth:`run_stack` can run this step: uniform sequences over a plain pool, planned for native kernels."""
        plain = not self._pool.layout.quantised and self._pool.storage.dtype in STORABLE
        return plain and not self._ragged and self._batch.native is not None

    def run_stack(
        self, stack: LayerStack, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], layers: int
    ) -> torch.Tensor:
        """The first ``layers`` layers over the step, in place: [T, D] float32 to the same."""
        assert self._batch.native is not None  # noqa: S101 - stacks() was asked
        stack.run(x, angles, self._pool.storage, self._slots, self._batch.native, self._scale, layers)
        return x

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store k and v ([T, kv_heads, d], after RoPE) and return the attention output [T, heads, d]."""
        q_, k, v = self._as_read(q, k, v)
        outs = [attend(rows, view, batch, self._scale) for rows, view, batch in self._stored(layer, q_, k, v)]
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).to(q.dtype)

    def attend_with_lse(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`attend`, and the log-sum-exp of every row's scaled scores, [T, heads] float32."""
        q_, k, v = self._as_read(q, k, v)
        pairs = [attend_with_lse(rows, view, batch, self._scale) for rows, view, batch in self._stored(layer, q_, k, v)]
        outs, sums = zip(*pairs, strict=True)
        return torch.cat(outs).to(q.dtype), torch.cat(sums)

    def _as_read(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """In the dtype the pool is read in; native kernels take float32 beside any pool."""
        if use_native(parts[0]):
            return parts
        return tuple(part.to(self._pool.memory.dtype) for part in parts)

    def _stored(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> list[tuple[torch.Tensor, LayerKV, PagedBatch]]:
        """Store keys and values; the queries of uniform and of ragged sequences with what they attend over."""
        rows = self._rows
        parts: list[tuple[torch.Tensor, LayerKV, PagedBatch]] = []
        if rows or not self._ragged:
            view = self._pool.layer(layer)
            write_kv(view, self._slots, k[:rows], v[:rows])
            parts.append((q[:rows], view, self._batch))
        if self._ragged:
            slots, batch = self._layer_plan(layer)
            write_kv(self._pool.blocks, slots, k[rows:], v[rows:])
            parts.append((q[rows:], self._pool.blocks, batch))
        return parts

    def _layer_plan(self, layer: int) -> tuple[torch.Tensor, PagedBatch]:
        """Slots and plan of the ragged sequences in one layer, over the pool's single-layer blocks."""
        size, device = self._pool.block_tokens, self._pool.device
        slots: list[int] = []
        tables: list[list[int]] = []
        counts: list[int] = []
        ends: list[int] = []
        for layers, layer_counts in self._ragged:
            table, count = layers[layer], layer_counts[layer]
            end = table.tokens + count
            slots.extend(table.blocks[slot // size] * size + slot % size for slot in range(table.tokens, end))
            tables.append(table.blocks)
            counts.append(count)
            ends.append(end)
        return torch.tensor(slots, dtype=torch.int64, device=device), plan_batch(tables, counts, ends, size, device)
