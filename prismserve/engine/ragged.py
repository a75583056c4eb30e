"""Ragged tables: a block table and a length per layer, and the compaction that makes a sequence ragged.

A uniform sequence has one table of groups. Once a layer is compacted, each layer has a table of single-layer blocks:
first those of whole groups the sequence still shares with others (its base, kept in ``Sequence.table``), then blocks of
its own. Where heads keep different tokens, each head's tokens lie compacted in the same slots, equally many per head.
Keys are stored after RoPE, so what moves keeps its position. Where the pool is quantised, codes and scales move as they
are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prismserve.core.errors import EngineError, InvalidRequestError, OutOfBlocksError

if TYPE_CHECKING:
    from collections.abc import Sequence as Items

    from prismserve.engine.pool import KVPool
    from prismserve.engine.prefix_cache import PrefixCache
    from prismserve.engine.sequence import Sequence


@dataclass(slots=True)
class LayerTable:
    """One layer of a ragged sequence.

    Attributes:
        blocks: single-layer blocks in order; the first ``shared`` of them belong to groups of the base.
        tokens: slots that hold KV.
        shared: leading blocks the layer must not write to.
    """

    blocks: list[int]
    tokens: int
    shared: int

    @property
    def owned(self) -> list[int]:
        """Blocks that belong to this layer of this sequence alone."""
        return self.blocks[self.shared :]


@dataclass(frozen=True, slots=True)
class Compaction:
    """A compaction that was done, so that it can be repeated when the sequence is computed again.

    Attributes:
        at: computed cache slots when it was done.
        layer: decoder layer.
        keep: [k] or [kv_heads, k] int64 on the CPU.
    """

    at: int
    layer: int
    keep: torch.Tensor


def check_keep(keep: torch.Tensor, tokens: int, kv_heads: int) -> torch.Tensor:
    """Validate indices to keep; [kv_heads or 1, k] int64 on the CPU.

    Raises:
        InvalidRequestError: wrong shape or dtype, an index outside the layer, or one named twice.
    """
    rows = keep.detach().to("cpu")
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.shape[0] not in {1, kv_heads} or rows.dtype is not torch.int64:
        message = f"keep must be int64 [k] or [{kv_heads}, k], got {keep.dtype} {tuple(keep.shape)}"
        raise InvalidRequestError(message, field="keep")
    ordered = rows.sort(dim=1).values
    inside = rows.numel() == 0 or (int(ordered[:, 0].min()) >= 0 and int(ordered[:, -1].max()) < tokens)
    if not inside or bool((ordered.diff(dim=1) == 0).any()):
        message = f"keep must name distinct slots of the layer's {tokens}"
        raise InvalidRequestError(message, field="keep")
    return rows


def _leading_kept(rows: torch.Tensor) -> int:
    """How many leading slots stay where they are in every head."""
    moved = (rows != torch.arange(rows.shape[1])).any(dim=0).nonzero()
    return rows.shape[1] if moved.numel() == 0 else int(moved[0])


class RaggedLayers:
    """What can be done to single layers of sequences.

    Args:
        pool: where blocks are.
        prefix: through which they are allocated and whole groups released.
    """

    def __init__(self, pool: KVPool, prefix: PrefixCache) -> None:
        self._pool = pool
        self._prefix = prefix

    def compact(self, sequence: Sequence, layer: int, keep: torch.Tensor) -> None:
        """Keep some of a layer's slots, compacted to the front; the rest of its memory is given back.

        Shared and cached groups are left as they are: what changes is copied to blocks of the sequence's own.

        Args:
            sequence: holds blocks; not exporting or importing. It publishes nothing from now on.
            layer: decoder layer.
            keep: [k] or [kv_heads, k] int64, distinct slots of this layer. Kept tokens lie in the order given.

        Raises:
            InvalidRequestError: ``keep`` or ``layer`` makes no sense.
            OutOfBlocksError: too few blocks for the copy; the sequence is unchanged.
        """
        layout = self._pool.layout
        if not 0 <= layer < layout.layers:
            message = f"layer {layer} is outside 0..{layout.layers - 1}"
            raise InvalidRequestError(message, field="layer")
        tokens = sequence.cached if sequence.ragged is None else sequence.ragged[layer].tokens
        rows = check_keep(keep, tokens, layout.kv_heads)
        leading = _leading_kept(rows)
        if rows.shape[1] == tokens == leading:
            return
        try:
            fresh = self._allocate_copy(sequence, layer, rows.shape[1], leading)
        except OutOfBlocksError:
            # Memory is short: what only this sequence looks at leaves the cache, so that it can be changed in place.
            if not self.unshare(sequence):
                raise
            fresh = self._allocate_copy(sequence, layer, rows.shape[1], leading)
        table = self._break_up(sequence)[layer]
        self._move(table, rows, min(table.shared, leading // layout.block_tokens), fresh)
        self._trim_base(sequence)
        if sequence.taps is not None:
            sequence.taps.compact(layer, rows)
        sequence.publishable = False
        sequence.compactions.append(Compaction(sequence.cached, layer, keep.detach().to("cpu").clone()))

    def open(self, sequence: Sequence, matched: Items[int], base: int, room: Items[int]) -> None:
        """Make a sequence that holds nothing ragged, with room for so many slots in each layer.

        Args:
            sequence: gets a base of whole groups, and tables by layer behind it.
            matched: groups from the prefix cache that hold the first slots.
            base: slots of the base, a whole number of blocks.
            room: slots of each layer, the base included.

        Raises:
            OutOfBlocksError: too few blocks; the sequence is unchanged.
        """
        pool, groups = self._pool, base // self._pool.block_tokens
        held = list(matched)
        pool.retain(held)
        try:
            held += self._prefix.allocate(groups - len(held))
            fresh = self._prefix.allocate_blocks(self.missing_of(room, groups))
        except OutOfBlocksError:
            self._prefix.release(held)
            raise
        sequence.table, sequence.ragged = held, []
        sequence.published = len(matched)
        sequence.cached = sequence.prefix_tokens = len(matched) * pool.block_tokens
        for layer, tokens in enumerate(room):
            own = max(0, pool.blocks_for(tokens) - groups)
            blocks = [group * pool.layout.layers + layer for group in held] + fresh[:own]
            del fresh[:own]
            sequence.ragged.append(LayerTable(blocks, sequence.cached, groups))

    def missing_of(self, room: Items[int], groups: int) -> int:
        """Single-layer blocks that :meth:`open` takes beside a base of ``groups`` groups."""
        return sum(max(0, self._pool.blocks_for(tokens) - groups) for tokens in room)

    def trim(self, sequence: Sequence) -> None:
        """Give back owned blocks behind the last slot of each layer."""
        for table in sequence.ragged or ():
            used = max(table.shared, self._pool.blocks_for(table.tokens))
            self._pool.free_blocks(table.blocks[used:])
            del table.blocks[used:]

    def missing(self, sequence: Sequence, tokens: int) -> int:
        """Single-layer blocks a ragged sequence still needs before ``tokens`` more tokens fit every layer."""
        return sum(
            max(0, self._pool.blocks_for(table.tokens + tokens) - len(table.blocks)) for table in sequence.ragged or ()
        )

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Allocate what :meth:`missing` counts; OutOfBlocksError, and nothing taken, if there is too little."""
        fresh = self._prefix.allocate_blocks(self.missing(sequence, tokens))
        for table in sequence.ragged or ():
            count = max(0, self._pool.blocks_for(table.tokens + tokens) - len(table.blocks))
            table.blocks.extend(fresh[len(fresh) - count :])
            del fresh[len(fresh) - count :]

    def release(self, sequence: Sequence) -> None:
        """Give back all blocks of the sequence's own; its base stays."""
        for table in sequence.ragged or ():
            self._pool.free_blocks(table.owned)
        sequence.ragged = None

    def unshare(self, sequence: Sequence) -> bool:
        """Make the last groups of the base the sequence's own, as far as nobody else looks at them.

        Returns:
            Whether any was; blocks that no layer needed were given back.
        """
        before = self._shared_groups(sequence)
        if sequence.ragged is None:
            while (shared := self._shared_groups(sequence)) and self._prefix.forget(sequence.table[shared - 1]):
                sequence.published = min(sequence.published, shared - 1)
            return self._shared_groups(sequence) < before
        while sequence.table and self._own_alone(sequence.table[-1]):
            index = len(sequence.table) - 1
            sequence.published = min(sequence.published, index)
            blocks = self._pool.break_up(sequence.table.pop())
            for table, block in zip(sequence.ragged, blocks, strict=True):
                if table.shared > index:
                    table.shared = index
                else:
                    self._pool.free_blocks([block])
        return self._shared_groups(sequence) < before

    def _own_alone(self, group: int) -> bool:
        """Whether a table's group is its own alone, once it left the cache; one that cannot leave it is not."""
        if self._pool.is_listed(group):
            return self._prefix.forget(group)
        return self._pool.references[group] == 1

    def _allocate_copy(self, sequence: Sequence, layer: int, kept: int, leading: int) -> list[int]:
        """Blocks that a layer needs beyond those it owns, to hold ``kept`` slots of which ``leading`` do not move."""
        if sequence.ragged is None:
            shared = self._shared_groups(sequence)
            owned = len(sequence.table) - shared
        else:
            shared, owned = sequence.ragged[layer].shared, len(sequence.ragged[layer].owned)
        staying = min(shared, leading // self._pool.block_tokens)
        return self._prefix.allocate_blocks(max(0, self._pool.blocks_for(kept) - staying - owned))

    def _shared_groups(self, sequence: Sequence) -> int:
        """Leading groups of the table that must stay whole: up to the last that is shared or cached."""
        for index in range(len(sequence.table), 0, -1):
            group = sequence.table[index - 1]
            if self._pool.references[group] > 1 or self._pool.is_listed(group):
                return index
        return 0

    def _break_up(self, sequence: Sequence) -> list[LayerTable]:
        if sequence.ragged is None:
            layers = self._pool.layout.layers
            shared = self._shared_groups(sequence)
            own = [self._pool.break_up(group) for group in sequence.table[shared:]]
            base = sequence.table[:shared]
            sequence.table = base
            sequence.ragged = [
                LayerTable(
                    [group * layers + layer for group in base] + [blocks[layer] for blocks in own],
                    sequence.cached,
                    shared,
                )
                for layer in range(layers)
            ]
        return sequence.ragged

    def _move(self, table: LayerTable, rows: torch.Tensor, staying: int, fresh: list[int]) -> None:
        """Gather the kept slots and write them behind the ``staying`` shared blocks, reusing owned ones first."""
        pool = self._pool
        wanted = pool.blocks_for(rows.shape[1]) - staying
        keys, values = pool.read_blocks(table.blocks, 0, table.tokens, rows=True)
        first = staying * pool.block_tokens
        index = rows[:, first:].T[:, :, None].to(keys.device)
        index = index.expand(-1, keys.shape[1], keys.shape[2])
        owned = table.owned + fresh
        pool.free_blocks(owned[wanted:])
        table.blocks = table.blocks[:staying] + owned[:wanted]
        table.shared = staying
        table.tokens = rows.shape[1]
        pool.write_blocks(table.blocks, first, keys.gather(0, index), values.gather(0, index))

    def _trim_base(self, sequence: Sequence) -> None:
        """Let go of whole groups that no layer looks at any more."""
        needed = max(table.shared for table in sequence.ragged or ())
        self._prefix.release(sequence.table[needed:])
        sequence.table = sequence.table[:needed]
        sequence.published = min(sequence.published, needed)


def check_tables(sequence: Sequence, layers: int, block_tokens: int) -> list[int]:
    """Verify a ragged sequence's tables against its base.

    Returns:
        The single-layer blocks it owns.

    Raises:
        EngineError: on a mismatch.
    """
    tables = sequence.ragged or []
    owned: list[int] = []
    for layer, table in enumerate(tables):
        base = [group * layers + layer for group in sequence.table[: table.shared]]
        if table.blocks[: table.shared] != base or table.tokens > len(table.blocks) * block_tokens:
            message = f"the table of layer {layer} does not fit its base or its {table.tokens} tokens"
            raise EngineError(message, request_id=sequence.request.request_id)
        owned.extend(table.owned)
    if tables and (len(tables) != layers or len(sequence.table) != max(table.shared for table in tables)):
        message = "a ragged sequence holds groups that none of its layers uses"
        raise EngineError(message, request_id=sequence.request.request_id)
    return owned


__all__ = ["Compaction", "LayerTable", "RaggedLayers", "check_keep", "check_tables"]
