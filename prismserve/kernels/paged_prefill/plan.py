"""Where the sequences of a batch lie, worked out once and used by every layer with the same tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Ragged:
    """Sequences of any lengths, on the device of the queries.

    The query rows of a sequence are its last tokens: with n cached and q query rows, row i sees ``n - q + i + 1``
    slots.

    Attributes:
        tables: [B, W] int32 groups, padded with group 0.
        q_starts: [B] int32, a sequence's first row among the flattened queries.
        q_lens: [B] int32 rows, 0 allowed.
        kv_lens: [B] int32 cached tokens, at least ``q_lens``.
        q_len_max: no sequence has more query rows.
        kv_len_max: no sequence has more cached tokens.
        q_total: query rows of all sequences.
        kv_total: cached tokens of all sequences.
    """

    tables: torch.Tensor
    q_starts: torch.Tensor
    q_lens: torch.Tensor
    kv_lens: torch.Tensor
    q_len_max: int
    kv_len_max: int
    q_total: int
    kv_total: int


def pad_tables(tables: Sequence[Sequence[int]], device: torch.device | str) -> torch.Tensor:
    """[B, W] int32 of tables of any lengths, padded with group 0."""
    width = max((len(table) for table in tables), default=0)
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    return torch.tensor(padded, dtype=torch.int32, device=device).view(len(tables), width)


def plan_ragged(
    tables: Sequence[Sequence[int]],
    q_starts: Sequence[int],
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    block_tokens: int,
    device: torch.device | str = "cpu",
) -> Ragged:
    """Move the sizes of a batch to the device.

    Args:
        tables: groups of each sequence in order; longer than needed is allowed.
        q_starts: first query row of each sequence; rows of different sequences do not overlap.
        q_lens: query rows of each sequence.
        kv_lens: cached tokens of each sequence, its query rows included.
        block_tokens: slots per group.
        device: where the queries and the cache live.
    """
    used = [table[: -(-cached // block_tokens)] for table, cached in zip(tables, kv_lens, strict=True)]
    starts, queries, cached = (
        torch.tensor(list(side), dtype=torch.int32, device=device) for side in (q_starts, q_lens, kv_lens)
    )
    return Ragged(
        tables=pad_tables(used, device),
        q_starts=starts,
        q_lens=queries,
        kv_lens=cached,
        q_len_max=max(q_lens, default=0),
        kv_len_max=max(kv_lens, default=0),
        q_total=sum(q_lens),
        kv_total=sum(kv_lens),
    )
