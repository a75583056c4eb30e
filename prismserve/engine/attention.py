"""Attention of one step over the KV pool: the decoder's view of the paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.kernels.paged_attention import attend, plan_batch, write_kv

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from prismserve.engine.pool import KVPool


class PagedAttention:
    """Writes the step's keys and values into the pool and attends over each sequence's blocks.

    Made once per step; every layer uses the same plan because uniform sequences share one table over all layers.
    """

    def __init__(
        self,
        pool: KVPool,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        slots: torch.Tensor,
    ) -> None:
        """Plan one step.

        Args:
            pool: where the blocks are.
            tables: groups of each sequence.
            starts: cache slots each sequence held before this step.
            counts: tokens of each sequence in this step, flattened in this order.
            slots: [T] int64, ``group * block_tokens + offset`` of each token.
        """
        self._storage = pool.storage
        self._slots = slots
        self._scale = pool.layout.head_dim**-0.5
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self._batch = plan_batch(tables, counts, ends, pool.block_tokens, pool.storage.device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store k and v ([T, kv_heads, d], after RoPE) and return the attention output [T, heads, d]."""
        view = self._storage[:, layer]
        write_kv(view, self._slots, k, v)
        return attend(q, view, self._batch, self._scale)
