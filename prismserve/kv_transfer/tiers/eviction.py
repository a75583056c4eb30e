"""Which block leaves a full tier: pure bookkeeping over keys, no memory and no I/O.

LRU: least recently used. GDSF (Greedy-Dual-Size-Frequency, Cherkasova, HPL-98-69R1): a block's priority is
``L + uses * cost / size``, where L is the priority of the last block evicted, so what was popular once ages. Blocks of a
tier are equally large, which leaves ``L + uses * cost``.

A block is of no use without those before it, so a run is always marked from its end: what comes first is evicted last.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OWNER_BYTES = 16


@dataclass(frozen=True, slots=True)
class Label:
    """What a tier knows of a block beside its bytes.

    Attributes:
        owner: 16 bytes that stand for the tenant whose block it is; zeros for the default one.
        share: part of a tier that the owner may fill while others want room.
        cost: what computing the block again costs, in any unit that is the same for all blocks of a tier.
    """

    owner: bytes = bytes(OWNER_BYTES)
    share: float = 1.0
    cost: float = 1.0


@dataclass(slots=True)
class _Entry:
    label: Label
    rank: tuple[float, int]
    uses: int = 1


@dataclass(slots=True)
class _Holding:
    blocks: int = 0
    heap: list[tuple[tuple[float, int], bytes]] = field(default_factory=list)


class Evictor:
    """Keys of one tier, ranked.

    Args:
        capacity: blocks the tier holds.
        policy: see the module.
    """

    def __init__(self, capacity: int, policy: Literal["lru", "gdsf"]) -> None:
        self.capacity = capacity
        self._gdsf = policy == "gdsf"
        self._entries: dict[bytes, _Entry] = {}
        self._holdings: dict[bytes, _Holding] = {}
        self._clock = 0
        self._floor = 0.0

    def __len__(self) -> int:
        """Keys held."""
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        """Whether a key is held; does not count as use."""
        return key in self._entries

    def keys(self) -> list[bytes]:
        """Keys held, the first to leave first."""
        return sorted(self._entries, key=lambda key: self._entries[key].rank)

    def label(self, key: bytes) -> Label:
        """What was said of a key when it was added; KeyError if it is not held."""
        return self._entries[key].label

    def rank(self, key: bytes) -> int:
        """The moment of a key's last use, for storing; KeyError if it is not held."""
        return self._entries[key].rank[1]

    def add(self, key: bytes, label: Label) -> None:
        """Hold a key that is not held; the caller has made room with :meth:`victim`."""
        self._entries[key] = entry = _Entry(label, (0.0, 0))
        self._holdings.setdefault(label.owner, _Holding()).blocks += 1
        self._rerank(key, entry)

    def touch(self, run: Sequence[bytes]) -> None:
        """A run of blocks, first to last, was used; keys that are not held are passed over."""
        for key in reversed(run):
            entry = self._entries.get(key)
            if entry is not None:
                entry.uses += 1
                self._rerank(key, entry)

    def remove(self, key: bytes) -> bool:
        """Forget a key; whether it was held."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        holding = self._holdings[entry.label.owner]
        holding.blocks -= 1
        if not holding.blocks:
            del self._holdings[entry.label.owner]
        return True

    def victim(self, incoming: Label, pinned: Iterable[bytes] = ()) -> bytes | None:
        """The key to evict before ``incoming`` is added; None while there is room, or if all are pinned.

        The owner furthest above its share loses its lowest ranked block; what comes in counts as its owner's already.
        """
        if len(self._entries) < self.capacity:
            return None
        kept = set(pinned)
        best: tuple[float, tuple[float, int], bytes] | None = None
        for owner, holding in self._holdings.items():
            found = self._lowest(holding, kept)
            if found is None:
                continue
            rank, key = found
            share = incoming.share if owner == incoming.owner else self._entries[key].label.share
            held = holding.blocks + (owner == incoming.owner)
            candidate = (-max(0.0, held - share * self.capacity), rank, key)
            best = candidate if best is None else min(best, candidate)
        if best is None:
            return None
        self._floor = max(self._floor, best[1][0])
        return best[2]

    def _lowest(self, holding: _Holding, kept: set[bytes]) -> tuple[tuple[float, int], bytes] | None:
        passed: list[tuple[tuple[float, int], bytes]] = []
        found = None
        while holding.heap:
            rank, key = holding.heap[0]
            entry = self._entries.get(key)
            if entry is None or entry.rank != rank:
                heapq.heappop(holding.heap)
            elif key in kept:
                passed.append(heapq.heappop(holding.heap))
            else:
                found = rank, key
                break
        for item in passed:
            heapq.heappush(holding.heap, item)
        return found

    def _rerank(self, key: bytes, entry: _Entry) -> None:
        self._clock += 1
        worth = self._floor + entry.uses * entry.label.cost if self._gdsf else 0.0
        entry.rank = (worth, self._clock)
        holding = self._holdings[entry.label.owner]
        heapq.heappush(holding.heap, (entry.rank, key))
        if len(holding.heap) > 2 * holding.blocks + 64:
            live = [(rank, held) for rank, held in holding.heap if self._is_current(rank, held)]
            heapq.heapify(live)
            holding.heap = live

    def _is_current(self, rank: tuple[float, int], key: bytes) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.rank == rank
