"""What sequences do with blocks: match, allocate, grow, publish, compact, swap, release."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.core.errors import EngineError, OutOfBlocksError
from prismserve.core.prompt import block_key
from prismserve.engine.prefix_cache import CacheOwner, PrefixCache, PrefixMatch
from prismserve.engine.ragged import RaggedLayers, check_tables
from prismserve.engine.scheduler import Room
from prismserve.engine.swap import SwapSpace

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Items

    import torch

    from prismserve.core.types import BlockKey
    from prismserve.engine.pool import KVPool
    from prismserve.engine.sequence import Sequence


def owner_of(sequence: Sequence) -> CacheOwner:
    """Whose the blocks of a sequence are once they are cached."""
    return CacheOwner(sequence.request.tenant, sequence.request.cache_share)


class BlockManager:
    """The pool and its prefix cache, seen from sequences.

    Attributes:
        pool: block storage and counts.
        prefix: the prefix cache over it.
        swap: host memory for preempted sequences.
    """

    def __init__(self, pool: KVPool, *, prefix_caching: bool, swap_bytes: int = 0) -> None:
        """Manage the blocks of ``pool``; at most ``swap_bytes`` of host memory are used beside it."""
        self.pool = pool
        self.prefix = PrefixCache(pool, enabled=prefix_caching)
        self.swap = SwapSpace(pool, self.prefix, swap_bytes)
        self._ragged = RaggedLayers(pool, self.prefix)

    def match(self, sequence: Sequence) -> PrefixMatch:
        """The cached prefix that need not be computed."""
        return self.prefix.match(sequence.namespace, sequence.keys, sequence.slots, sequence.match_limit)

    def room(self) -> Room:
        """What can be allocated now."""
        return Room(self.prefix.available(), self.pool.slab.free_blocks)

    def admission(self, sequence: Sequence, match: PrefixMatch) -> Room:
        """Free or idle room that admitting the sequence takes up, idle matched groups included."""
        idle = sum(self.pool.references[group] == 0 for group in match.groups)
        if sequence.pruning is not None:
            base = sequence.pruning.base // self.pool.block_tokens
            return Room(base - len(match.groups) + idle, self._ragged.missing_of(sequence.pruning.room, base))
        return Room(self.pool.blocks_for(sequence.cached + sequence.computable) - len(match.groups) + idle)

    def growth(self, sequence: Sequence) -> Room:
        """Room still missing for all slots that can be computed."""
        if sequence.ragged is not None:
            return Room(0, self._ragged.missing(sequence, self._ahead(sequence)))
        return Room(max(0, self.pool.blocks_for(sequence.cached + sequence.computable) - len(sequence.table)))

    def releasable(self, sequence: Sequence) -> Room:
        """Room that becomes available when the sequence lets go of its blocks."""
        groups = sum(self.pool.references[group] == 1 for group in sequence.table)
        owned = [block for table in sequence.ragged or () for block in table.owned]
        whole = self.pool.slab.freed_groups(owned)
        # The free blocks of a group that becomes whole leave the count of single ones, which is why this may shrink it.
        return Room(groups + whole, len(owned) - whole * self.pool.layout.layers)

    def admit(self, sequence: Sequence) -> None:
        """Give a sequence its table: matched blocks, a copied partial block, fresh ones for all it can compute.

        Raises:
            OutOfBlocksError: too few blocks; the sequence is unchanged.
        """
        match = self.match(sequence)
        if sequence.pruning is not None:
            self._ragged.open(sequence, match.groups, sequence.pruning.base, sequence.pruning.room)
            return
        held = list(match.groups)
        self.pool.retain(held)
        wanted = self.pool.blocks_for(sequence.cached + sequence.computable) - len(held)
        source = match.partial_source
        # Holding the source keeps it from being evicted by this very allocation, and may itself cost an idle block.
        if source is not None and wanted + (self.pool.references[source] == 0) > self.prefix.available():
            source = None
        sources = [source] if source is not None else []
        self.pool.retain(sources)
        try:
            fresh = self.prefix.allocate(wanted, owner_of(sequence))
        except EngineError:
            self.prefix.release([*held, *sources])
            raise
        if source is not None:
            self.pool.copy(source, fresh[0], match.partial_tokens)
            self.prefix.release(sources)
        sequence.table = held + fresh
        sequence.published = len(held)
        sequence.cached = match.tokens if source is not None else len(held) * self.pool.block_tokens
        sequence.prefix_tokens = sequence.cached

    def reserve(self, sequence: Sequence, blocks: int) -> None:
        """Give a sequence ``blocks`` blocks whose KV will be written from outside, matched full blocks first.

        Raises:
            OutOfBlocksError: too few blocks; the sequence is unchanged.
        """
        held = self.prefix.held_run(sequence.keys[:blocks])
        self.pool.retain(held)
        try:
            fresh = self.prefix.allocate(blocks - len(held), owner_of(sequence))
        except EngineError:
            self.prefix.release(held)
            raise
        sequence.table = held + fresh
        sequence.published = len(held)
        sequence.cached = sequence.prefix_tokens = len(held) * self.pool.block_tokens

    def reserve_layers(self, sequence: Sequence, room: Items[int]) -> None:
        """Give a sequence blocks for ``room`` slots in each layer, whose KV will be written from outside.

        Raises:
            OutOfBlocksError: too few blocks; the sequence is unchanged.
        """
        self._ragged.open(sequence, (), 0, room)

    def trim(self, sequence: Sequence) -> None:
        """Give back blocks of a ragged sequence that hold nothing."""
        self._ragged.trim(sequence)

    def _ahead(self, sequence: Sequence) -> int:
        """Slots to have room for in every layer; a prompt under a prefill method was given all its room at once."""
        within = sequence.pruning is not None and sequence.cached < sequence.pruning.prompt_tokens
        return 0 if within else sequence.computable

    def grow(self, sequence: Sequence) -> None:
        """Allocate what is missing for all slots that can be computed; OutOfBlocksError if there is too little."""
        if sequence.ragged is not None:
            self._ragged.grow(sequence, self._ahead(sequence))
            return
        missing = self.growth(sequence).blocks
        if missing:
            sequence.table.extend(self.prefix.allocate(missing, owner_of(sequence)))

    def compact(self, sequence: Sequence, layer: int, keep: torch.Tensor) -> None:
        """Keep some of a layer's slots: see :meth:`prismserve.engine.ragged.RaggedLayers.compact`."""
        self._ragged.compact(sequence, layer, keep)

    def unshare(self, sequence: Sequence) -> bool:
        """Take what only a ragged sequence looks at out of the cache: gives memory back where little is left.

        Returns:
            Whether anything changed.
        """
        return sequence.ragged is not None and self._ragged.unshare(sequence)

    def read_layer(self, sequence: Sequence, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy out all keys and values one layer holds of a sequence: two [tokens, kv_heads, head_dim] tensors."""
        if sequence.ragged is None:
            return self.pool.read(layer, sequence.table, 0, sequence.cached)
        table = sequence.ragged[layer]
        return self.pool.read_blocks(table.blocks, 0, table.tokens)

    def repeat_compactions(self, sequence: Sequence) -> bool:
        """Do the compactions that are due in a sequence that is being computed again.

        Returns:
            False if one found too few blocks; it stays due.
        """
        while sequence.replay and sequence.replay[0].at == sequence.cached:
            due = sequence.replay[0]
            try:
                self._ragged.compact(sequence, due.layer, due.keep)
            except OutOfBlocksError:
                return False
            sequence.replay.pop(0)
        return True

    def swap_out(self, sequence: Sequence) -> bool:
        """Move a sequence's KV to host memory and let go of its blocks; False, and nothing done, without room.

        A prompt on its way through cuts is computed again instead: rows that wait between layers are not swapped.
        """
        if sequence.pruning is not None and sequence.cached < sequence.pruning.prompt_tokens:
            return False
        if not self.swap.copy_out(sequence):
            return False
        self.release(sequence)
        sequence.published = 0
        return True

    def publish(self, sequence: Sequence, *, movable: bool) -> None:
        """List the sequence's newly filled blocks.

        Where another group is listed under the same key, the sequence takes that one over and drops its own, so that
        listed blocks always hang on listed parents it references too.

        Args:
            sequence: its first ``cached`` slots hold final KV.
            movable: whether its table may change; if not, publishing ends at the first conflict.
        """
        block = self.pool.block_tokens
        full = min(sequence.cached // block, len(sequence.keys), len(sequence.table))
        # The tables of a ragged sequence's layers name the groups too.
        movable = movable and sequence.ragged is None
        while sequence.publishable and sequence.published < full:
            index = sequence.published
            parent = sequence.keys[index - 1] if index else sequence.namespace
            own = sequence.table[index]
            slots = sequence.slots[index * block : (index + 1) * block]
            listed = self.prefix.insert(parent, sequence.keys[index], own, slots, owner_of(sequence))
            if listed != own:
                if not movable:
                    sequence.publishable = False
                    return
                self.pool.retain([listed])
                self.prefix.release([own])
                sequence.table[index] = listed
            sequence.published += 1

    def publish_tail(self, sequence: Sequence) -> None:
        """List the partly filled last block of a sequence that computes no more, so that others can copy from it."""
        block = self.pool.block_tokens
        end = min(sequence.cached, sequence.shareable)
        index, rest = divmod(end, block)
        computed = rest and index < len(sequence.table)
        if computed and sequence.publishable and sequence.published == index and self.prefix.enabled:
            parent = sequence.keys[index - 1] if index else sequence.namespace
            slots = sequence.slots[index * block : end]
            key = block_key(parent, slots)
            self.prefix.insert(parent, key, sequence.table[index], slots, owner_of(sequence))

    def copy_out(self, key: BlockKey, target: torch.Tensor) -> CacheOwner | None:
        """Copy a cached full block, which may leave the cache meanwhile; see ``Engine.copy_block``."""
        found = self.prefix.full_block(key)
        if found is None:
            return None
        group, owner = found
        (tag,) = self.pool.tags((group,))
        self.pool.memory.copy_group_out(group, target)
        # A full, listed block does not change; what left the list meanwhile has another tag, or another key.
        if self.prefix.full_block(key) != found or self.pool.tags((group,)) != (tag,):
            return None
        return CacheOwner(owner, self.prefix.share_of(owner))

    def release(self, sequence: Sequence) -> None:
        """Drop the sequence's blocks."""
        self._ragged.release(sequence)
        self.prefix.release(sequence.table)
        sequence.table = []

    def check(self, sequences: Iterable[Sequence], pins: Iterable[Iterable[int]]) -> None:
        """Verify counts, lists and tables against each other; EngineError names the first mismatch."""
        expected: dict[int, int] = {}
        owned: list[int] = []
        swapped_bytes = 0
        for sequence in sequences:
            swapped_bytes += 0 if sequence.swapped is None else sequence.swapped.nbytes
            uniform = sequence.ragged is None and sequence.swapped is None
            owned.extend(check_tables(sequence, self.pool.layout.layers, self.pool.block_tokens))
            if uniform and sequence.cached > len(sequence.table) * self.pool.block_tokens:
                message = f"{sequence.cached} tokens are cached in {len(sequence.table)} blocks"
                raise EngineError(message, request_id=sequence.request.request_id)
            if len(set(sequence.table)) != len(sequence.table):
                message = "a block appears twice in one table"
                raise EngineError(message, request_id=sequence.request.request_id)
            for group in sequence.table:
                expected[group] = expected.get(group, 0) + 1
            for group in sequence.table[: sequence.published] if len(self.prefix) else ():
                if not self.pool.is_listed(group):
                    message = f"published KV block {group} is not in the prefix cache"
                    raise EngineError(message, request_id=sequence.request.request_id)
        for pin in pins:
            for group in pin:
                expected[group] = expected.get(group, 0) + 1
        if swapped_bytes != self.swap.used_bytes:
            message = f"{swapped_bytes} bytes of KV are swapped, {self.swap.used_bytes} are counted"
            raise EngineError(message)
        self.pool.check(expected, owned)
        self.prefix.check()
