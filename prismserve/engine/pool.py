"""The KV block pool: storage, reference counts, generation tags, the free list, broken groups."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

import torch

from prismserve.core.errors import EngineError, LeaseExpiredError, OutOfBlocksError
from prismserve.engine.slab import Slab
from prismserve.engine.storage import KVStorage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prismserve.core.types import KVLayout
    from prismserve.kernels.paged_cache import LayerKV


class TableReader:
    """Reads consecutive tokens of one sequence, as numbers or as they lie in memory."""

    def __init__(self, pool: KVPool, table: Sequence[int], layer_tables: Sequence[Sequence[int]] | None) -> None:
        self._pool = pool
        self._table = table
        self._layer_tables = layer_tables

    def __call__(self, layer: int, start_token: int, tokens: int, *, rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`KVPool.read_rows` or :meth:`KVPool.read`."""
        if self._layer_tables is not None:
            return self._pool.read_blocks(self._layer_tables[layer], start_token, tokens, rows=rows)
        read = self._pool.read_rows if rows else self._pool.read
        return read(layer, self._table, start_token, tokens)


class KVPool:
    """Blocks of KV, handed out in groups: one block in every layer, under one id.

    A group is *used* (referenced by at least one table or pin), *idle* (unreferenced but listed by the prefix cache),
    *broken* into single-layer blocks with owners of their own (counted as used) or *free*. Its generation grows each
    time its last reference goes and it is not listed, each time it is allocated and when it is broken, so a writer
    that holds an older generation is refused. Single-layer blocks have tags of their own, see
    :class:`prismserve.engine.slab.Slab`.

    Counts and lists belong to the engine thread. ``write`` and ``read`` may be called from a transfer thread for
    groups that thread's import or export holds; the lock orders a checked write against the freeing of its groups.

    Attributes:
        memory: the blocks themselves.
        storage: [groups, layers, 2, block_tokens, kv_heads, head_dim] in the layout's dtype; codes as bytes where the
            layout is quantised.
        slab: the broken groups.
    """

    def __init__(
        self, layout: KVLayout, groups: int, device: torch.device | str = "cpu", *, scratch: bool = False
    ) -> None:
        """Allocate ``groups`` groups of ``layout.block_tokens`` tokens each (memory is touched on first use).

        With ``scratch`` there is one more, :attr:`scratch_group`, that is never handed out.
        """
        if groups < 1:
            message = f"the KV pool needs at least 1 group, got {groups}"
            raise ValueError(message)
        self.layout = layout
        self.groups = groups
        self.block_tokens = layout.block_tokens
        self.memory = KVStorage(layout, groups + scratch, device)
        self.scratch_group = groups
        self.storage = self.memory.parts[0]
        self.slab = Slab(layout.layers)
        self.references = [0] * groups
        self.generations = [0] * groups
        self._listed = bytearray(groups)
        self._free: deque[int] = deque(range(groups))
        self._idle = 0
        self._lock = threading.Lock()

    @property
    def free_groups(self) -> int:
        """Groups nobody references and the prefix cache does not list."""
        return len(self._free)

    @property
    def idle_groups(self) -> int:
        """Groups nobody references that the prefix cache lists."""
        return self._idle

    @property
    def used_groups(self) -> int:
        """Groups referenced by a table or a pin, and broken ones."""
        return self.groups - len(self._free) - self._idle

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.memory.device

    @property
    def blocks(self) -> LayerKV:
        """Single-layer blocks as one layer of ``groups * layers`` groups, as the kernels take it."""
        return self.memory.blocks

    def layer(self, layer: int) -> LayerKV:
        """One layer of every group, as the kernels take it."""
        return self.memory.layer(layer)

    def blocks_for(self, tokens: int) -> int:
        """Groups that hold ``tokens`` tokens."""
        return -(-tokens // self.block_tokens)

    def can_allocate(self, groups: int) -> bool:
        """Whether ``groups`` groups are on the free list now."""
        return groups <= len(self._free)

    def allocate(self, groups: int) -> list[int]:
        """Take groups from the free list, each with one reference; OutOfBlocksError if there are too few."""
        if groups > len(self._free):
            message = f"the KV pool has {len(self._free)} free blocks, {groups} are needed"
            raise OutOfBlocksError(message)
        taken = [self._free.popleft() for _ in range(groups)]
        with self._lock:
            for group in taken:
                self.references[group] = 1
                self.generations[group] += 1
        return taken

    def retain(self, groups: Iterable[int]) -> None:
        """Add one reference to each group; each must be used or idle."""
        for group in groups:
            if self.references[group] == 0:
                if not self._listed[group]:
                    message = f"KV block {group} is free and cannot be referenced"
                    raise EngineError(message)
                self._idle -= 1
            self.references[group] += 1

    def free(self, groups: Iterable[int]) -> list[int]:
        """Drop one reference of each group.

        Returns:
            The groups that became idle, in the order given; unlisted ones went to the free list.
        """
        idle: list[int] = []
        with self._lock:
            for group in groups:
                if self.references[group] <= 0:
                    message = f"KV block {group} was freed more often than referenced"
                    raise EngineError(message)
                self.references[group] -= 1
                if self.references[group]:
                    continue
                if self._listed[group]:
                    self._idle += 1
                    idle.append(group)
                else:
                    self.generations[group] += 1
                    self._free.append(group)
        return idle

    def list_group(self, group: int) -> None:
        """Mark a used group as held by the prefix cache: it becomes idle, not free, when its last reference goes."""
        if self.references[group] == 0 or self._listed[group]:
            message = f"KV block {group} cannot be listed: it is unreferenced or listed already"
            raise EngineError(message)
        self._listed[group] = 1

    def unlist_group(self, group: int) -> None:
        """Undo :meth:`list_group`; an idle group goes to the free list."""
        if not self._listed[group]:
            message = f"KV block {group} is not listed"
            raise EngineError(message)
        with self._lock:
            self._listed[group] = 0
            if self.references[group] == 0:
                self._idle -= 1
                self.generations[group] += 1
                self._free.append(group)

    def is_listed(self, group: int) -> bool:
        """Whether the prefix cache lists the group."""
        return bool(self._listed[group])

    def tags(self, groups: Iterable[int]) -> tuple[int, ...]:
        """Current generation of each group."""
        return tuple(self.generations[group] for group in groups)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` tokens of every layer of one group to another."""
        self.memory.copy_tokens(source, target, tokens)

    def write(
        self,
        layer: int,
        table: Sequence[int],
        start_token: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        generations: Sequence[int] | None = None,
    ) -> None:
        """Write one layer's K and V of consecutive tokens.

        Args:
            layer: decoder layer.
            table: groups of the sequence, in order; only those the range covers are touched.
            start_token: first cache slot to write.
            keys: [T, kv_heads, head_dim] numbers; or rows as :meth:`read_rows` gives them, which are stored as they are.
            values: as ``keys``.
            generations: tag of each group of ``table`` when the caller was given it; LeaseExpiredError, and nothing
                written, if one has changed since. None leaves the check out.
        """
        self._check_layer(layer)
        layers = self.layout.layers
        with self._lock:
            first, last = self._span(table, start_token, keys.shape[0])
            for index in range(first, last):
                if generations is not None and self.generations[table[index]] != generations[index]:
                    message = f"KV block {table[index]} was freed while it was being written; the write is refused"
                    raise LeaseExpiredError(message)
            self._store([group * layers + layer for group in table[first:last]], start_token, keys, values)

    def read(
        self, layer: int, table: Sequence[int], start_token: int, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy out one layer's K and V of consecutive tokens: two [tokens, kv_heads, head_dim] in the layout's dtype."""
        return self._load(self._layer_blocks(layer, table, start_token, tokens), start_token, tokens, rows=False)

    def read_rows(
        self, layer: int, table: Sequence[int], start_token: int, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`read`, but as it lies in memory.

        Returns:
            For a quantised layout, two uint8 [tokens, kv_heads, row_bytes], codes followed by scale and offset;
            otherwise what :meth:`read` returns.
        """
        return self._load(self._layer_blocks(layer, table, start_token, tokens), start_token, tokens, rows=True)

    def reader(self, table: Sequence[int], layer_tables: Sequence[Sequence[int]] | None = None) -> TableReader:
        """A function for the send thread of a transfer; a ragged sequence has a table of blocks per layer."""
        return TableReader(self, table, layer_tables)

    # ---- single-layer blocks ---------------------------------------------------------------------------------

    def break_up(self, group: int) -> list[int]:
        """Turn a used group into single-layer blocks of its one owner.

        Returns:
            Its blocks, in the order of layers.

        Raises:
            EngineError: the group is shared or listed.
        """
        if self.references[group] != 1 or self._listed[group]:
            message = f"KV block {group} is shared or cached and cannot be broken up"
            raise EngineError(message)
        with self._lock:
            self.references[group] = 0
            self.generations[group] += 1
            return self.slab.break_up(group, taken=True)

    def allocate_blocks(self, blocks: int) -> list[int]:
        """Take single-layer blocks, breaking free groups as needed; OutOfBlocksError if there are too few."""
        missing = self.groups_for_blocks(blocks)
        if missing > len(self._free):
            message = f"the KV pool has {len(self._free)} free blocks, {missing} are needed"
            raise OutOfBlocksError(message)
        with self._lock:
            for _ in range(missing):
                group = self._free.popleft()
                self.generations[group] += 1
                self.slab.break_up(group, taken=False)
            return self.slab.allocate(blocks)

    def groups_for_blocks(self, blocks: int) -> int:
        """Free groups that must be broken to give ``blocks`` single-layer blocks."""
        return max(0, -(-(blocks - self.slab.free_blocks) // self.layout.layers))

    def free_blocks(self, blocks: Iterable[int]) -> None:
        """Give single-layer blocks back; a group whose blocks are all free becomes whole and free."""
        with self._lock:
            for group in self.slab.free(blocks):
                self.generations[group] += 1
                self._free.append(group)

    def write_blocks(
        self,
        blocks: Sequence[int],
        start_token: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        tags: Sequence[int] | None = None,
    ) -> None:
        """:meth:`write` for a table of layer blocks; ``tags`` are those of :attr:`slab` for ``blocks``."""
        with self._lock:
            first, last = self._span(blocks, start_token, keys.shape[0])
            for index in range(first, last):
                if tags is not None and self.slab.tag(blocks[index]) != tags[index]:
                    message = f"layer block {blocks[index]} was freed while it was being written; the write is refused"
                    raise LeaseExpiredError(message)
            self._store(blocks[first:last], start_token, keys, values)

    def read_blocks(
        self, blocks: Sequence[int], start_token: int, tokens: int, *, rows: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`read`, or with ``rows`` :meth:`read_rows`, for a table of layer blocks."""
        first, last = self._span(blocks, start_token, tokens)
        return self._load(blocks[first:last], start_token, tokens, rows=rows)

    # ---- checking --------------------------------------------------------------------------------------------

    def check(self, expected_references: dict[int, int], owned_blocks: Iterable[int] = ()) -> None:
        """Compare counts, marks and the free list with the references the engine knows of.

        Args:
            expected_references: references of each group by tables and pins; 0 where it is left out.
            owned_blocks: single-layer blocks of ragged tables.

        Raises:
            EngineError: on the first mismatch.
        """
        self.slab.check(owned_blocks)
        free = set(self._free)
        if len(free) != len(self._free):
            message = "the free list names a KV block twice"
            raise EngineError(message)
        idle = 0
        for group in range(self.groups):
            held = expected_references.get(group, 0)
            if self.references[group] != held:
                message = f"KV block {group} has {self.references[group]} references, its tables and pins hold {held}"
                raise EngineError(message)
            unlisted_idle = held == 0 and not self._listed[group] and group not in self.slab
            idle += held == 0 and bool(self._listed[group])
            if (group in free) != unlisted_idle:
                message = f"KV block {group} is {'on' if group in free else 'missing from'} the free list"
                raise EngineError(message)
        if idle != self._idle:
            message = f"{idle} KV blocks are idle, {self._idle} are counted"
            raise EngineError(message)

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.layout.layers:
            message = f"layer {layer} is outside 0..{self.layout.layers - 1}"
            raise EngineError(message)

    def _span(self, table: Sequence[int], start_token: int, tokens: int) -> tuple[int, int]:
        """First and one past the last entry of ``table`` that a range of slots touches."""
        if start_token < 0 or start_token + tokens > len(table) * self.block_tokens:
            message = f"tokens {start_token}..{start_token + tokens} do not fit a table of {len(table)} blocks"
            raise EngineError(message)
        return start_token // self.block_tokens, -(-(start_token + tokens) // self.block_tokens)

    def _layer_blocks(self, layer: int, table: Sequence[int], start_token: int, tokens: int) -> list[int]:
        self._check_layer(layer)
        first, last = self._span(table, start_token, tokens)
        return [group * self.layout.layers + layer for group in table[first:last]]

    def _store(self, blocks: Sequence[int], start_token: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write into ``blocks``, the first of which holds slot ``start_token``."""
        rows = self.memory.is_rows(keys)
        wanted = (self.layout.kv_heads, self.layout.row_bytes if rows else self.layout.head_dim)
        if keys.shape[1:] != wanted or values.shape != keys.shape or values.dtype is not keys.dtype:
            message = f"keys {list(keys.shape)} and values {list(values.shape)} must both be [tokens, {wanted[0]}, {wanted[1]}]"
            raise EngineError(message)
        offset = start_token % self.block_tokens
        places = torch.arange(offset, offset + keys.shape[0], device=self.device)
        starts = torch.tensor(blocks, dtype=torch.int64, device=self.device) * self.block_tokens
        slots = starts[places // self.block_tokens] + places % self.block_tokens
        (self.memory.write_rows if rows else self.memory.write)(slots, keys, values)

    def _load(
        self, blocks: Sequence[int], start_token: int, tokens: int, *, rows: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        offset = start_token % self.block_tokens
        keys, values = (self.memory.read_rows if rows else self.memory.read)(ids)
        return keys[offset : offset + tokens], values[offset : offset + tokens]
