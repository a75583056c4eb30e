"""Single-layer blocks carved from whole groups: the allocator behind ragged tables.

A group of the pool is one block in every layer under one id, which is all a sequence needs as long as its layers keep
the same tokens. A ragged sequence needs more blocks in one layer than in another, so groups are broken up: block
``group * layers + place`` of the flattened storage then belongs to whatever layer took it. A broken group whose blocks
are all free again becomes whole, as in a slab allocator (Bonwick, USENIX Summer 1994).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prismserve.core.errors import EngineError, OutOfBlocksError

if TYPE_CHECKING:
    from collections.abc import Iterable

_FREE = 0


@dataclass(slots=True)
class _Broken:
    """One broken group: the tag of each of its blocks (0 where free) and the free places."""

    tags: list[int]
    free: list[int]


class Slab:
    """Which blocks of which broken groups are taken. A taken block has exactly one owner.

    Attributes:
        layers: blocks a group is broken into.
    """

    def __init__(self, layers: int) -> None:
        """Start without broken groups."""
        self.layers = layers
        self._broken: dict[int, _Broken] = {}
        self._partial: dict[int, None] = {}
        self._free = 0
        # Tags are never given twice, so a block that was freed and taken again is told from what it was.
        self._tags = itertools.count(1)

    def __len__(self) -> int:
        """Broken groups."""
        return len(self._broken)

    def __contains__(self, group: int) -> bool:
        """Whether the group is broken."""
        return group in self._broken

    @property
    def free_blocks(self) -> int:
        """Blocks of broken groups that nobody has taken."""
        return self._free

    def break_up(self, group: int, *, taken: bool) -> list[int]:
        """Break a group, all of whose blocks start taken by one owner, or free.

        Returns:
            Its blocks, in the order of layers.
        """
        if group in self._broken:
            message = f"KV group {group} is broken already"
            raise EngineError(message)
        if taken:
            self._broken[group] = _Broken([next(self._tags) for _ in range(self.layers)], [])
        else:
            self._broken[group] = _Broken([_FREE] * self.layers, list(reversed(range(self.layers))))
            self._partial[group] = None
            self._free += self.layers
        first = group * self.layers
        return list(range(first, first + self.layers))

    def allocate(self, blocks: int) -> list[int]:
        """Take free blocks of broken groups; OutOfBlocksError if there are too few."""
        if blocks > self._free:
            message = f"{self._free} single-layer KV blocks are free, {blocks} are needed"
            raise OutOfBlocksError(message)
        taken: list[int] = []
        while len(taken) < blocks:
            group = next(iter(self._partial))
            broken = self._broken[group]
            while broken.free and len(taken) < blocks:
                place = broken.free.pop()
                broken.tags[place] = next(self._tags)
                taken.append(group * self.layers + place)
            if not broken.free:
                del self._partial[group]
        self._free -= blocks
        return taken

    def free(self, blocks: Iterable[int]) -> list[int]:
        """Give blocks back.

        Returns:
            Groups that are whole again; the slab has forgotten them.
        """
        whole: list[int] = []
        for block in blocks:
            group, place = divmod(block, self.layers)
            broken = self._broken.get(group)
            if broken is None or broken.tags[place] == _FREE:
                message = f"single-layer KV block {block} was freed but not taken"
                raise EngineError(message)
            broken.tags[place] = _FREE
            broken.free.append(place)
            self._partial[group] = None
            self._free += 1
            if len(broken.free) == self.layers:
                del self._broken[group]
                del self._partial[group]
                self._free -= self.layers
                whole.append(group)
        return whole

    def tag(self, block: int) -> int:
        """The tag a taken block got when it was taken; 0 if nobody has it."""
        broken = self._broken.get(block // self.layers)
        return _FREE if broken is None else broken.tags[block % self.layers]

    def freed_groups(self, blocks: Iterable[int]) -> int:
        """Groups that would be whole again if these blocks were given back."""
        counts: dict[int, int] = {}
        for block in blocks:
            group = block // self.layers
            counts[group] = counts.get(group, 0) + 1
        return sum(count + len(self._broken[group].free) == self.layers for group, count in counts.items())

    def check(self, owned: Iterable[int]) -> None:
        """Compare the taken blocks with those the engine knows to be owned; EngineError on a mismatch."""
        expected = list(owned)
        held = set(expected)
        if len(held) != len(expected):
            message = "a single-layer KV block has two owners"
            raise EngineError(message)
        taken: set[int] = set()
        free = 0
        for group, broken in self._broken.items():
            empty = {place for place, tag in enumerate(broken.tags) if tag == _FREE}
            if empty != set(broken.free) or len(broken.free) != len(empty) or bool(empty) != (group in self._partial):
                message = f"the free list of broken KV group {group} does not match its blocks"
                raise EngineError(message)
            if len(empty) == self.layers:
                message = f"broken KV group {group} has no owner left but is not whole"
                raise EngineError(message)
            free += len(empty)
            taken.update(group * self.layers + place for place in range(self.layers) if place not in empty)
        if taken != held:
            message = f"single-layer KV blocks {sorted(taken ^ held)[:4]} are taken without an owner, or owned but free"
            raise EngineError(message)
        if free != self._free:
            message = f"{free} single-layer KV blocks are free, {self._free} are counted"
            raise EngineError(message)
