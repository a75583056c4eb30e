"""What a step's attention needs to know, worked out once and used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from prismserve.kernels.dispatch import use_native_on, use_triton_on
from prismserve.kernels.paged_prefill.plan import Ragged, plan_ragged

_BUCKET_GROWTH = 2


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Single-token queries of sequences of similar length, attended in one call.

    Attributes:
        rows: [B] int64 rows of the flattened queries.
        blocks: [B * width] int64 groups, each sequence padded with its own last block.
        visible: [B, 1, 1, S] bool, which cache slots a sequence has; None if all have all S.
        slots: S, cache slots gathered per sequence.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    visible: torch.Tensor | None
    slots: int


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Several query rows of one sequence.

    Attributes:
        start: first row of the flattened queries.
        queries: number of rows; they are the last tokens of the sequence.
        cached: cache slots after this step, at least ``queries``.
        blocks: [ceil(cached / block_tokens)] int64 groups.
    """

    start: int
    queries: int
    cached: int
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class RaggedStep:
    """A step in the form the kernels take.

    Attributes:
        singles: the sequences with one query row; None if there are none.
        spans: the sequences with several query rows; None if there are none.
    """

    singles: Ragged | None
    spans: Ragged | None


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """The sequences of one step: plain metadata on the device, valid for every layer with the same tables.

    Attributes:
        rows: query rows of all sequences.
        buckets: single-token queries, for the reference.
        spans: sequences of several query rows, for the reference.
        ragged: both, for the Triton kernels; where it is set, ``buckets`` and ``spans`` are empty.
        native: all sequences, for the native kernel; where it is set, the others are empty.
    """

    rows: int
    buckets: tuple[DecodeBucket, ...]
    spans: tuple[PrefillSpan, ...]
    ragged: RaggedStep | None = None
    native: Ragged | None = None


def _check(tables: Sequence[Sequence[int]], q_lens: Sequence[int], kv_lens: Sequence[int], block_tokens: int) -> None:
    if not len(tables) == len(q_lens) == len(kv_lens):
        message = f"{len(tables)} tables, {len(q_lens)} q_lens and {len(kv_lens)} kv_lens: the lengths must be equal"
        raise ValueError(message)
    for index, (table, queries, cached) in enumerate(zip(tables, q_lens, kv_lens, strict=True)):
        if not 0 <= queries <= cached:
            message = f"sequence {index}: q_len {queries} must lie between 0 and its kv_len {cached}"
            raise ValueError(message)
        if len(table) * block_tokens < cached:
            message = f"sequence {index}: {len(table)} blocks of {block_tokens} cannot hold {cached} tokens"
            raise ValueError(message)


def _bucket(members: Sequence[tuple[int, Sequence[int], int]], block_tokens: int, device: torch.device) -> DecodeBucket:
    """One bucket of (row, table, kv_len) with the longest last."""
    slots = max(cached for _, _, cached in members)
    width = -(-slots // block_tokens)
    blocks: list[int] = []
    for _, table, cached in members:
        used = -(-cached // block_tokens)
        blocks.extend(table[:used])
        blocks.extend([table[used - 1]] * (width - used))
    lengths = [cached for _, _, cached in members]
    visible: torch.Tensor | None = None
    if min(lengths) < slots:
        ends = torch.tensor(lengths, device=device)
        visible = (torch.arange(slots, device=device) < ends[:, None])[:, None, None, :]
    return DecodeBucket(
        rows=torch.tensor([row for row, _, _ in members], device=device),
        blocks=torch.tensor(blocks, device=device),
        visible=visible,
        slots=slots,
    )


def _plan_step(
    tables: Sequence[Sequence[int]],
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    block_tokens: int,
    device: torch.device,
) -> PagedBatch:
    """The plan for the kernels."""
    singles: list[int] = []
    spans: list[int] = []
    starts: list[int] = []
    row = 0
    for index, count in enumerate(q_lens):
        starts.append(row)
        row += count
        if count:
            (singles if count == 1 else spans).append(index)

    def pick(members: list[int]) -> Ragged | None:
        if not members:
            return None
        first_rows, queries, cached = ([side[index] for index in members] for side in (starts, q_lens, kv_lens))
        return plan_ragged([tables[index] for index in members], first_rows, queries, cached, block_tokens, device)

    return PagedBatch(row, (), (), RaggedStep(pick(singles), pick(spans)))


def plan_batch(
    tables: Sequence[Sequence[int]],
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    block_tokens: int,
    device: torch.device | str = "cpu",
) -> PagedBatch:
    """Sort a step's sequences into single-token buckets and spans.

    Args:
        tables: groups of each sequence in order; longer than needed is allowed.
        q_lens: query rows of each sequence; the rows of all sequences are concatenated in this order. May be 0.
        kv_lens: cache slots of each sequence after this step's keys and values are written (includes its queries).
        block_tokens: slots per block.
        device: where the queries and the cache live.

    Returns:
        A plan for :func:`attend`, in the form of the implementation that will run on ``device``. Bucketing keeps
        padding below a factor of two per sequence; the kernels need none.

    Raises:
        ValueError: lengths disagree, or a table cannot hold its sequence.
    """
    _check(tables, q_lens, kv_lens, block_tokens)
    device = torch.device(device)
    if use_triton_on(device):
        return _plan_step(tables, q_lens, kv_lens, block_tokens, device)
    if use_native_on(device):
        starts = [0, *accumulate(q_lens)]
        native = plan_ragged(tables, starts[:-1], q_lens, kv_lens, block_tokens, device)
        return PagedBatch(starts[-1], (), (), native=native)
    singles: list[tuple[int, Sequence[int], int]] = []
    spans: list[PrefillSpan] = []
    row = 0
    for table, queries, cached in zip(tables, q_lens, kv_lens, strict=True):
        if queries == 1:
            singles.append((row, table, cached))
        elif queries > 1:
            blocks = torch.tensor(list(table[: -(-cached // block_tokens)]), device=device)
            spans.append(PrefillSpan(row, queries, cached, blocks))
        row += queries
    singles.sort(key=lambda single: single[2])
    buckets: list[DecodeBucket] = []
    first = 0
    for end in range(1, len(singles) + 1):
        limit = max(_BUCKET_GROWTH * singles[first][2], block_tokens)
        if end == len(singles) or singles[end][2] > limit:
            buckets.append(_bucket(singles[first:end], block_tokens, device))
            first = end
    return PagedBatch(row, tuple(buckets), tuple(spans))
