"""Which query rows score which cache slots, worked out once and used by every layer with the same tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prismserve.kernels.paged_prefill.plan import pad_tables


@dataclass(frozen=True, slots=True)
class ScoreBatch:
    """Query rows of a batch of sequences, flattened in order.

    Attributes:
        tables: [B, W] int32 groups, padded with group 0.
        starts: [B] int32, a sequence's first row.
        rows: [B] int32, its number of rows.
        visible: [T] int32, cache slots that a row sees (its position + 1).
        rows_max: of any sequence.
        slots: S, the width of the result.
    """

    tables: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor
    visible: torch.Tensor
    rows_max: int
    slots: int


def plan_rows(
    tables: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    block_tokens: int,
    device: torch.device | str = "cpu",
) -> ScoreBatch:
    """Plan the scores of chosen rows.

    The last row alone is ``[n - 1]``, a window of the last w rows ``range(n - w, n)``, and raters any positions;
    without causality every row is at ``n - 1``.

    Args:
        tables: groups of each sequence in order; longer than needed is allowed.
        positions: cache slot of each query row of each sequence; a row sees the slots up to and including its own.
        block_tokens: slots per group.
        device: where the queries and the cache live.

    Raises:
        ValueError: lengths disagree, or a position is negative or outside its table.
    """
    if len(tables) != len(positions):
        message = f"{len(tables)} tables and {len(positions)} lists of positions: the lengths must be equal"
        raise ValueError(message)
    starts: list[int] = []
    visible: list[int] = []
    for index, (table, rows) in enumerate(zip(tables, positions, strict=True)):
        if any(not 0 <= position < len(table) * block_tokens for position in rows):
            message = f"sequence {index}: positions {list(rows)} must lie in {len(table)} blocks of {block_tokens}"
            raise ValueError(message)
        starts.append(len(visible))
        visible.extend(position + 1 for position in rows)

    def device_ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return ScoreBatch(
        tables=pad_tables(tables, device),
        starts=device_ints(starts),
        rows=device_ints([len(rows) for rows in positions]),
        visible=device_ints(visible),
        rows_max=max((len(rows) for rows in positions), default=0),
        slots=max(visible, default=0),
    )
