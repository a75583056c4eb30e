"""Prefix reuse: which group holds the KV of which chained block key, evicted least recently used leaf first.

Every block has an owner, the tenant whose request made it; chains of two owners never meet, because the tenant is part
of their root. While somebody wants room, owners that hold more than their share of the pool lose blocks first.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from prismserve.core.errors import EngineError, OutOfBlocksError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prismserve.core.prompt import Element
    from prismserve.core.types import BlockKey
    from prismserve.engine.pool import KVPool

_CHILDREN_SCANNED = 32
# Undrained events kept; beyond that the oldest are forgotten, which costs whoever listens a miss, not an error.
_EVENTS_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the cache holds of a sequence.

    Attributes:
        groups: groups of the leading full blocks.
        partial_source: a group whose leading tokens continue the match, or None.
        partial_tokens: how many of its tokens do.
        tokens: all cached tokens.
    """

    groups: tuple[int, ...]
    partial_source: int | None
    partial_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """Net change of the held keys since the last drain."""

    added: list[BlockKey]
    removed: list[BlockKey]

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(self.added or self.removed)


@dataclass(frozen=True, slots=True)
class CacheOwner:
    """Whose cached blocks they are.

    Attributes:
        name: of the tenant; "" is the default one.
        share: part of the pool the owner may fill while others want room.
    """

    name: str = ""
    share: float = 1.0


NOBODY = CacheOwner()


@dataclass(slots=True)
class _Holding:
    """What one owner has in the cache; ``heap`` names (stamp, key) of leaves that may be idle."""

    share: float
    groups: int = 0
    heap: list[tuple[int, BlockKey]] = field(default_factory=list)


@dataclass(slots=True)
class _Node:
    parent: bytes
    group: int
    block: tuple[Element, ...]
    stamp: int
    owner: str
    children: dict[BlockKey, None] = field(default_factory=dict)


def _common_prefix(left: Sequence[Element], right: Sequence[Element], limit: int) -> int:
    count = 0
    for a, b in zip(left, islice(right, limit), strict=False):
        if a != b:
            break
        count += 1
    return count


class PrefixCache:
    """A tree over block keys whose nodes name groups of the pool.

    Invariant: a table that references a listed group references all its ancestors too, so every idle group can be
    evicted in time by taking leaves. All references taken by tables and pins are dropped through :meth:`release`.

    Attributes:
        enabled: whether anything is held at all.
    """

    def __init__(self, pool: KVPool, *, enabled: bool = True) -> None:
        """List groups of ``pool``; a disabled cache holds nothing and matches nothing."""
        self._pool = pool
        self.enabled = enabled
        self._nodes: dict[BlockKey, _Node] = {}
        self._key_of: dict[int, BlockKey] = {}
        self._roots: dict[bytes, dict[BlockKey, None]] = {}
        self._holdings: dict[str, _Holding] = {}
        self._clock = 0
        self._added: dict[BlockKey, None] = {}
        self._removed: dict[BlockKey, None] = {}

    def __len__(self) -> int:
        """Keys held."""
        return len(self._nodes)

    def keys(self) -> list[BlockKey]:
        """Keys of all full blocks held, parents before their children."""
        return [key for key, node in self._nodes.items() if self._is_full(node)]

    def available(self) -> int:
        """Groups that can be allocated now, evicting idle ones as needed."""
        return self._pool.free_groups + self._pool.idle_groups

    def held_run(self, keys: Iterable[BlockKey]) -> list[int]:
        """Groups of the longest leading run of ``keys`` that is held; a run starts at a root and follows the chain."""
        groups: list[int] = []
        previous: bytes | None = None
        for key in keys:
            node = self._nodes.get(key)
            if node is None or not self._is_full(node):
                break
            # Keys may come from another worker: a reference that leaves out an ancestor would break eviction.
            if node.parent != previous if previous is not None else node.parent in self._nodes:
                break
            groups.append(node.group)
            previous = key
        return groups

    def match(self, namespace: bytes, keys: Sequence[BlockKey], slots: Sequence[Element], limit: int) -> PrefixMatch:
        """Find the longest cached prefix.

        Args:
            namespace: root of the chain.
            keys: chained keys of the full blocks of ``slots``.
            slots: elements of the sequence.
            limit: match at most this many tokens.

        Returns:
            The match; nothing is referenced yet, so take references before the next allocation.
        """
        block = self._pool.block_tokens
        groups = self.held_run(keys[: limit // block])
        parent = keys[len(groups) - 1] if groups else namespace
        start = len(groups) * block
        best, source = 0, None
        rest = slots[start : min(limit, start + block)]
        siblings = self._nodes[parent].children if groups else self._roots.get(namespace, {})
        for key in islice(reversed(siblings), _CHILDREN_SCANNED) if rest else ():
            node = self._nodes[key]
            common = _common_prefix(rest, node.block, len(rest))
            if common > best:
                best, source = common, node.group
        return PrefixMatch(tuple(groups), source, best, start + best)

    def held_by(self, owner: str) -> int:
        """Groups that an owner has in the cache."""
        holding = self._holdings.get(owner)
        return 0 if holding is None else holding.groups

    def full_block(self, key: BlockKey) -> tuple[int, str] | None:
        """Group and owner of a full block; None if it is not held. May be asked from any thread."""
        node = self._nodes.get(key)
        return (node.group, node.owner) if node is not None and self._is_full(node) else None

    def share_of(self, owner: str) -> float:
        """The share an owner was last seen with; 1 if it holds nothing. May be asked from any thread."""
        holding = self._holdings.get(owner)
        return 1.0 if holding is None else holding.share

    def insert(
        self, parent: bytes, key: BlockKey, group: int, block: Sequence[Element], owner: CacheOwner = NOBODY
    ) -> int:
        """List a block that is referenced by its sequence.

        Args:
            parent: the previous block's key, or the namespace.
            key: the block's key.
            group: who holds its KV.
            block: its elements. Fewer than a block's tokens make it a tail: it can be copied from but is never
                matched whole, has no children and is not announced.
            owner: whose it is.

        Returns:
            The group listed under ``key``: ``group``, or another that was listed earlier.
        """
        if not self.enabled:
            return group
        known = self._nodes.get(key)
        if known is not None:
            return known.group
        self._pool.list_group(group)
        self._clock += 1
        self._nodes[key] = _Node(parent, group, tuple(block), self._clock, owner.name)
        holding = self._holdings.setdefault(owner.name, _Holding(owner.share))
        holding.share = owner.share
        holding.groups += 1
        self._key_of[group] = key
        above = self._nodes.get(parent)
        siblings = above.children if above is not None else self._roots.setdefault(parent, {})
        siblings[key] = None
        if len(block) == self._pool.block_tokens:
            self._note(key, gained=self._added, lost=self._removed)
        return group

    def release(self, groups: Sequence[int]) -> None:
        """Drop one reference of each group; the later a group in its table, the earlier it is evicted."""
        for group in self._pool.free(groups):
            node = self._nodes[self._key_of[group]]
            self._clock += 1
            node.stamp = self._clock
            if not node.children:
                self._offer(node, self._key_of[group])

    def allocate(self, groups: int, owner: CacheOwner = NOBODY) -> list[int]:
        """Allocate for an owner, evicting idle leaves as needed.

        What is asked for counts as held already, so that an owner at its share makes room for itself.

        Raises:
            OutOfBlocksError: too few groups are free or idle.
        """
        if groups > self.available():
            message = f"the KV pool can give {self.available()} blocks, {groups} are needed"
            raise OutOfBlocksError(message)
        while not self._pool.can_allocate(groups):
            self._evict_one(owner.name, groups)
        return self._pool.allocate(groups)

    def allocate_blocks(self, blocks: int) -> list[int]:
        """Take single-layer blocks, evicting idle leaves as needed; OutOfBlocksError if there are too few."""
        if self._pool.groups_for_blocks(blocks) > self.available():
            message = (
                f"the KV pool can give {self.available()} blocks and {self._pool.slab.free_blocks} single-layer ones, "
                f"{blocks} single-layer ones are needed"
            )
            raise OutOfBlocksError(message)
        while not self._pool.can_allocate(self._pool.groups_for_blocks(blocks)):
            self._evict_one()
        return self._pool.allocate_blocks(blocks)

    def forget(self, group: int) -> bool:
        """Stop listing a group that one table alone references, so that its owner may change it.

        Returns:
            False, and nothing changed, if it is shared or other listed blocks hang on it.
        """
        key = self._key_of.get(group)
        if key is None or self._pool.references[group] != 1 or self._nodes[key].children:
            return False
        self._remove(key)
        return True

    def delete(self, keys: Sequence[BlockKey]) -> int:
        """Evict a run of full blocks from its end on, with the tails that hang on them.

        Returns:
            How many; those that are referenced, or have full blocks after them, stay.
        """
        deleted = 0
        for key in reversed(keys):
            node = self._nodes.get(key)
            if node is None or not self._is_full(node) or self._pool.references[node.group]:
                continue
            for child in list(node.children):
                tail = self._nodes[child]
                if not self._is_full(tail) and not self._pool.references[tail.group]:
                    self._remove(child)
            if not node.children:
                self._remove(key)
                deleted += 1
        return deleted

    def clear(self) -> None:
        """Evict every idle block."""
        while self._pool.idle_groups:
            self._evict_one()

    def drain_events(self) -> CacheEvents:
        """Keys gained and lost since the last call; a key gained and lost in between appears in neither."""
        events = CacheEvents(list(self._added), list(self._removed))
        self._added.clear()
        self._removed.clear()
        return events

    def check(self) -> None:
        """Verify the tree against the pool; EngineError names the first mismatch."""
        for key, node in self._nodes.items():
            siblings = self._nodes[node.parent].children if node.parent in self._nodes else self._roots.get(node.parent)
            if siblings is None or key not in siblings:
                message = f"the cached block in group {node.group} is missing from its parent"
                raise EngineError(message)
            if self._key_of.get(node.group) != key or not self._pool.is_listed(node.group):
                message = f"group {node.group} is cached but not listed"
                raise EngineError(message)
            parent = self._nodes.get(node.parent)
            if parent is not None and self._pool.references[parent.group] < self._pool.references[node.group]:
                message = f"group {node.group} is referenced more often than its parent group {parent.group}"
                raise EngineError(message)
        if sum(holding.groups for holding in self._holdings.values()) != len(self._nodes):
            message = f"{len(self._nodes)} groups are cached, their owners are counted with another number"
            raise EngineError(message)
        listed = sum(self._pool.is_listed(group) for group in range(self._pool.groups))
        if listed != len(self._nodes) or len(self._key_of) != len(self._nodes):
            message = f"{listed} groups are listed, {len(self._nodes)} are cached"
            raise EngineError(message)

    def _is_victim(self, stamp: int, key: BlockKey) -> bool:
        node = self._nodes.get(key)
        return node is not None and node.stamp == stamp and not node.children and self._pool.references[node.group] == 0

    def _offer(self, node: _Node, key: BlockKey) -> None:
        """A leaf became idle: it can be evicted from now on."""
        holding = self._holdings[node.owner]
        heapq.heappush(holding.heap, (node.stamp, key))
        if len(holding.heap) > 2 * holding.groups + 64:
            holding.heap = [entry for entry in holding.heap if self._is_victim(*entry)]
            heapq.heapify(holding.heap)

    def _evict_one(self, wanting: str = "", wanted: int = 0) -> None:
        """Evict the least recently used idle leaf of the owner furthest above its share, of all if none is above.

        Args:
            wanting: the owner that room is made for.
            wanted: groups it is about to have beyond those it holds.
        """
        chosen: tuple[float, int, BlockKey] | None = None
        for name, holding in self._holdings.items():
            while holding.heap and not self._is_victim(*holding.heap[0]):
                heapq.heappop(holding.heap)
            if holding.heap:
                stamp, key = holding.heap[0]
                coming = wanted if name == wanting else 0
                excess = max(0.0, holding.groups + coming - holding.share * self._pool.groups)
                chosen = min(chosen or (0.0, stamp, key), (-excess, stamp, key))
        if chosen is None:
            message = "no idle KV block can be evicted although some are counted as idle"
            raise EngineError(message)
        self._remove(chosen[2])

    def _remove(self, key: BlockKey) -> None:
        node = self._nodes.pop(key)
        del self._key_of[node.group]
        holding = self._holdings[node.owner]
        holding.groups -= 1
        if not holding.groups:
            del self._holdings[node.owner]
        self._pool.unlist_group(node.group)
        parent = self._nodes.get(node.parent)
        if parent is not None:
            del parent.children[key]
            if not parent.children and self._pool.references[parent.group] == 0:
                self._offer(parent, node.parent)
        else:
            siblings = self._roots[node.parent]
            del siblings[key]
            if not siblings:
                del self._roots[node.parent]
        if self._is_full(node):
            self._note(key, gained=self._removed, lost=self._added)

    def _is_full(self, node: _Node) -> bool:
        return len(node.block) == self._pool.block_tokens

    def _note(self, key: BlockKey, gained: dict[BlockKey, None], lost: dict[BlockKey, None]) -> None:
        """Record a change unless it undoes one nobody has heard of."""
        if key in lost:
            del lost[key]
            return
        gained[key] = None
        if len(gained) > _EVENTS_MAX:
            del gained[next(iter(gained))]
