"""What sequences do with blocks: match, allocate, grow, publish, release."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.core.errors import EngineError
from prismserve.core.prompt import block_key
from prismserve.engine.prefix_cache import PrefixCache, PrefixMatch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prismserve.engine.pool import KVPool
    from prismserve.engine.sequence import Sequence


class BlockManager:
    """The pool and its prefix cache, seen from sequences.

    Attributes:
        pool: block storage and counts.
        prefix: the prefix cache over it.
    """

    def __init__(self, pool: KVPool, *, prefix_caching: bool) -> None:
        """Manage the blocks of ``pool``."""
        self.pool = pool
        self.prefix = PrefixCache(pool, enabled=prefix_caching)

    def match(self, sequence: Sequence) -> PrefixMatch:
        """The cached prefix; the last known token is left out, since its computation yields the logits."""
        return self.prefix.match(sequence.namespace, sequence.keys, sequence.slots, sequence.length - 1)

    def admission_blocks(self, sequence: Sequence, match: PrefixMatch) -> int:
        """Free or idle blocks that admitting the sequence takes up, idle matched ones included."""
        idle = sum(self.pool.references[group] == 0 for group in match.groups)
        return self.pool.blocks_for(sequence.length) - len(match.groups) + idle

    def growth_blocks(self, sequence: Sequence) -> int:
        """Blocks still missing for all known slots."""
        return max(0, self.pool.blocks_for(sequence.length) - len(sequence.table))

    def admit(self, sequence: Sequence) -> None:
        """Give a sequence its whole table: matched blocks, a copied partial block, fresh ones.

        Raises:
            OutOfBlocksError: too few blocks; the sequence is unchanged.
        """
        match = self.match(sequence)
        held = list(match.groups)
        self.pool.retain(held)
        wanted = self.pool.blocks_for(sequence.length) - len(held)
        source = match.partial_source
        # Holding the source keeps it from being evicted by this very allocation, and may itself cost an idle block.
        if source is not None and wanted + (self.pool.references[source] == 0) > self.prefix.available():
            source = None
        sources = [source] if source is not None else []
        self.pool.retain(sources)
        try:
            fresh = self.prefix.allocate(wanted)
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
            fresh = self.prefix.allocate(blocks - len(held))
        except EngineError:
            self.prefix.release(held)
            raise
        sequence.table = held + fresh
        sequence.published = len(held)
        sequence.cached = sequence.prefix_tokens = len(held) * self.pool.block_tokens

    def grow(self, sequence: Sequence) -> None:
        """Allocate what is missing for all known slots; OutOfBlocksError if there is too little."""
        missing = self.growth_blocks(sequence)
        if missing:
            sequence.table.extend(self.prefix.allocate(missing))

    def publish(self, sequence: Sequence, *, movable: bool) -> None:
        """List the sequence's newly filled blocks.

        Where another group is listed under the same key, the sequence takes that one over and drops its own, so that
        listed blocks always hang on listed parents it references too.

        Args:
            sequence: its first ``cached`` slots hold final KV.
            movable: whether its table may change; if not, publishing ends at the first conflict.
        """
        block = self.pool.block_tokens
        while sequence.publishable and sequence.published < sequence.cached // block:
            index = sequence.published
            parent = sequence.keys[index - 1] if index else sequence.namespace
            own = sequence.table[index]
            slots = sequence.slots[index * block : (index + 1) * block]
            listed = self.prefix.insert(parent, sequence.keys[index], own, slots)
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
        index, rest = divmod(sequence.cached, block)
        if rest and sequence.publishable and sequence.published == index and self.prefix.enabled:
            parent = sequence.keys[index - 1] if index else sequence.namespace
            slots = sequence.slots[index * block : sequence.cached]
            self.prefix.insert(parent, block_key(parent, slots), sequence.table[index], slots)

    def release(self, sequence: Sequence) -> None:
        """Drop the sequence's table."""
        self.prefix.release(sequence.table)
        sequence.table = []

    def check(self, sequences: Iterable[Sequence], pins: Iterable[Iterable[int]]) -> None:
        """Verify counts, lists and tables against each other; EngineError names the first mismatch."""
        expected: dict[int, int] = {}
        for sequence in sequences:
            if sequence.cached > len(sequence.table) * self.pool.block_tokens:
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
        self.pool.check(expected)
        self.prefix.check()
