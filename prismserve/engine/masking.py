"""Attention of decoders with sliding windows, or whose images are read in both directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prismserve.kernels.dispatch import use_native
from prismserve.kernels.masked_attention import MaskedRows, masked_attention
from prismserve.kernels.paged_attention import write_kv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.engine.pool import KVPool
    from prismserve.engine.run_item import RunItem
    from prismserve.models.config import DecoderConfig
    from prismserve.models.decoder import AttentionBackend


class MaskedAttention:
    """Stands before the step's ordinary attention and takes over where the ordinary causal mask does not hold."""

    def __init__(
        self,
        ordinary: AttentionBackend,
        config: DecoderConfig,
        pool: KVPool,
        items: Sequence[RunItem],
        slots: torch.Tensor,
    ) -> None:
        """Plan one step.

        Args:
            ordinary: attends in layers without window when no image is in the step.
            config: says which layers have windows, and whether images are read in both directions.
            pool: where the blocks are.
            items: what the step computes, in order.
            slots: [T] int64, ``group * block_tokens + offset`` of each token.
        """
        self._ordinary = ordinary
        self._windows = config.windows or (0,) * config.layers
        self._pool = pool
        self._slots = slots
        self._scale = pool.layout.head_dim**-0.5
        self._rows: list[MaskedRows] = []
        start = 0
        for item in items:
            cached = item.start + item.tokens
            table = item.sequence.table[: -(-cached // pool.block_tokens)]
            blocks = torch.tensor(table, dtype=torch.int64, device=pool.device)
            together = item.sequence.images_within(item.start, cached) if config.bidirectional_images else ()
            self._rows.append(MaskedRows(start, item.tokens, cached, blocks, together))
            start += item.tokens
        self._images = any(rows.together for rows in self._rows)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store k and v ([T, kv_heads, d], after RoPE) and return the attention output [T, heads, d]."""
        window = self._windows[layer]
        if not window and not self._images:
            return self._ordinary.attend(layer, q, k, v)
        view = self._pool.layer(layer)
        if use_native(q):
            write_kv(view, self._slots, k, v)
            return masked_attention(q, view, self._rows, self._scale, window)
        dtype = self._pool.memory.dtype
        write_kv(view, self._slots, k.to(dtype), v.to(dtype))
        return masked_attention(q.to(dtype), view, self._rows, self._scale, window).to(q.dtype)
