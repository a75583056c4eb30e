"""Masked paged attention in plain PyTorch: gather blocks, write the mask out, scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from prismserve.kernels.paged_cache.layout import LayerKV
from prismserve.kernels.paged_cache.reference import read_blocks

# Rows of queries attended at once: bounds the mask that is written out.
_TILE_ROWS = 256


@dataclass(frozen=True, slots=True)
class MaskedRows:
    """The query rows of one sequence: the last ``queries`` of its ``cached`` slots.

    Attributes:
        start: first row of the flattened queries.
        queries: number of rows, at least 1.
        cached: cache slots after this step, at least ``queries``.
        blocks: [ceil(cached / block_tokens)] int64 groups.
        together: (first, end) slots of runs whose members see each other in both directions; a run that reaches
            into the queries must end within ``cached``.
    """

    start: int
    queries: int
    cached: int
    blocks: torch.Tensor
    together: tuple[tuple[int, int], ...] = ()


def _mask(rows: MaskedRows, first: int, last: int, low: int, window: int, device: torch.device) -> torch.Tensor:
    """[last - first, cached - low] bool, which slots from ``low`` on the rows [first, last) see."""
    slots = torch.arange(low, rows.cached, device=device)
    positions = torch.arange(first, last, device=device)[:, None] + (rows.cached - rows.queries)
    seen = slots <= positions
    for start, end in rows.together:
        within = (positions >= start) & (positions < end)
        seen |= within & (slots >= start) & (slots < end)
    return seen & (slots > positions - window) if window else seen


def masked_attention(
    q: torch.Tensor, layer: LayerKV, sequences: Sequence[MaskedRows], scale: float, window: int
) -> torch.Tensor:
    """Attention of every query row to what it may see of its own sequence's cache.

    Row i of a sequence with q query rows and n cached slots stands at slot ``n - q + i``. It sees that slot and all
    before it, and the whole of a run of ``together`` it lies in; of these, a window leaves the last ``window`` slots
    up to its own and all that follow.

    Args:
        q: [T, H, d], after RoPE; H is a multiple of kv_heads.
        layer: one layer of the cache, plain or quantised, with this step's keys and values written.
        sequences: their rows cover T.
        scale: multiplies the scores.
        window: in cache slots; 0 for none.

    Returns:
        [T, H, d] in the dtype of ``q``.
    """
    out = torch.empty_like(q)
    for rows in sequences:
        keys, values = (
            side.flatten(0, 1)[None, : rows.cached].transpose(1, 2) for side in read_blocks(layer, rows.blocks, q.dtype)
        )
        queries = q[rows.start : rows.start + rows.queries].transpose(0, 1).unsqueeze(0)
        earlier = rows.cached - rows.queries
        for first in range(0, rows.queries, _TILE_ROWS):
            last = min(first + _TILE_ROWS, rows.queries)
            low = max(0, earlier + first - window + 1) if window else 0
            mask = _mask(rows, first, last, low, window, q.device)
            result = functional.scaled_dot_product_attention(
                queries[:, :, first:last],
                keys[:, :, low:],
                values[:, :, low:],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
            out[rows.start + first : rows.start + last].copy_(result[0].transpose(0, 1))
    return out
