"""Host memory for the KV of preempted sequences: copied out and back instead of computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prismserve.core.errors import EngineError
from prismserve.engine.ragged import LayerTable
from prismserve.engine.scheduler import Room

if TYPE_CHECKING:
    from prismserve.engine.pool import KVPool
    from prismserve.engine.prefix_cache import PrefixCache
    from prismserve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SwappedKV:
    """One sequence's KV in host memory.

    Attributes:
        data: the layer blocks that hold KV, as :meth:`KVStorage.take_blocks` gives them: group after group if the
            sequence is uniform, layer after layer if it is ragged.
        layer_tokens: slots that hold KV in each layer of a ragged sequence, None of a uniform one.
    """

    data: tuple[torch.Tensor, ...]
    layer_tokens: tuple[int, ...] | None

    @property
    def nbytes(self) -> int:
        """Host memory taken."""
        return sum(part.nbytes for part in self.data)


class SwapSpace:
    """Moves sequences between the pool and a bounded amount of host memory.

    Args:
        pool: where blocks are.
        prefix: through which they are allocated.
        budget_bytes: most host memory to use.
    """

    def __init__(self, pool: KVPool, prefix: PrefixCache, budget_bytes: int) -> None:
        self._pool = pool
        self._prefix = prefix
        self._budget_bytes = budget_bytes
        self._block_bytes = pool.memory.block_bytes
        self.used_bytes = 0

    def copy_out(self, sequence: Sequence) -> bool:
        """Copy a sequence's KV to host memory; its blocks are left for the caller to release.

        Returns:
            False, and nothing changed, if it holds none or there is no room.
        """
        blocks = self._filled_blocks(sequence)
        nbytes = len(blocks) * self._block_bytes
        if not blocks or self.used_bytes + nbytes > self._budget_bytes:
            return False
        tokens = None if sequence.ragged is None else tuple(table.tokens for table in sequence.ragged)
        sequence.swapped = SwappedKV(self._pool.memory.take_blocks(self._ids(blocks)), tokens)
        self.used_bytes += nbytes
        return True

    def needed(self, sequence: Sequence) -> Room:
        """Room that bringing a swapped sequence back takes up, idle groups it finds in the cache included."""
        tokens = self._swapped(sequence).layer_tokens
        ahead = sequence.computable
        if tokens is not None:
            return Room(0, sum(self._pool.blocks_for(count + ahead) for count in tokens))
        held = self._held(sequence)
        used = sum(self._pool.references[group] > 0 for group in held)
        return Room(self._pool.blocks_for(sequence.cached + ahead) - used)

    def copy_in(self, sequence: Sequence) -> None:
        """Give a swapped sequence blocks with its KV, taking over what the prefix cache holds of it.

        Raises:
            OutOfBlocksError: too few blocks; the sequence stays swapped.
        """
        swapped = self._swapped(sequence)
        if swapped.layer_tokens is None:
            self._uniform_in(sequence, swapped)
        else:
            self._ragged_in(sequence, swapped, swapped.layer_tokens)
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Free a sequence's host memory; nothing happens if it has none."""
        if sequence.swapped is not None:
            self.used_bytes -= sequence.swapped.nbytes
            sequence.swapped = None

    def _swapped(self, sequence: Sequence) -> SwappedKV:
        if sequence.swapped is None:
            message = "the sequence has no KV in host memory"
            raise EngineError(message, request_id=sequence.request.request_id)
        return sequence.swapped

    def _ids(self, blocks: list[int]) -> torch.Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._pool.device)

    def _filled_blocks(self, sequence: Sequence) -> list[int]:
        layers = self._pool.layout.layers
        if sequence.ragged is not None:
            return [block for table in sequence.ragged for block in table.blocks[: self._pool.blocks_for(table.tokens)]]
        groups = sequence.table[: self._pool.blocks_for(sequence.cached)]
        return [group * layers + layer for group in groups for layer in range(layers)]

    def _held(self, sequence: Sequence) -> list[int]:
        full = sequence.cached // self._pool.block_tokens
        return self._prefix.held_run(sequence.keys[:full]) if sequence.publishable else []

    def _uniform_in(self, sequence: Sequence, swapped: SwappedKV) -> None:
        held = self._held(sequence)
        self._pool.retain(held)
        try:
            fresh = self._prefix.allocate(self._pool.blocks_for(sequence.cached + sequence.computable) - len(held))
        except EngineError:
            self._prefix.release(held)
            raise
        layers = self._pool.layout.layers
        rows = tuple(part[len(held) * layers :] for part in swapped.data)
        groups = fresh[: len(rows[0]) // layers]
        blocks = [group * layers + layer for group in groups for layer in range(layers)]
        self._pool.memory.put_blocks(self._ids(blocks), rows)
        sequence.table = held + fresh
        sequence.published = len(held)

    def _ragged_in(self, sequence: Sequence, swapped: SwappedKV, layer_tokens: tuple[int, ...]) -> None:
        fresh = self._prefix.allocate_blocks(self.needed(sequence).layer_blocks)
        tables: list[LayerTable] = []
        filled: list[int] = []
        first = 0
        for tokens in layer_tokens:
            last = first + self._pool.blocks_for(tokens + sequence.computable)
            tables.append(LayerTable(fresh[first:last], tokens, 0))
            filled.extend(fresh[first : first + self._pool.blocks_for(tokens)])
            first = last
        self._pool.memory.put_blocks(self._ids(filled), swapped.data)
        sequence.table = []
        sequence.published = 0
        sequence.ragged = tables
