"""Which bits are set for which key, with chains of keys kept together so that matching one costs O(log n).

A block's key is a chained hash: it names its whole prefix. Two chains that agree in one key therefore agree in every
key before it, and a chain can be compared with another by a binary search that looks at a few keys. A *run* is a
stretch of keys with one mask. Every key has one dict entry, either its mask (a positive int) or the negative number of
its run; both are shared objects, and the dict holds nothing that the garbage collector must visit.

Where runs come from
    Keys that were added together may follow each other in a chain. Their run is unproven: the first chain that is
    looked up through it is compared key by key, the run is cut where the two part, and what agreed is proven from
    then on. Short proven neighbours with equal masks are joined when a lookup passes from one to the other. So neither
    evictions from the middle of a chain nor announcements in any order make an answer differ from that of a plain
    dict of masks; they only make it slower, once.

Adding a holder to keys that already are a run, and removing it, changes one mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from operator import eq
from typing import Final

_SCAN_KEYS_MIN: Final = 4
_SCAN_KEYS_MAX: Final = 256
# Joining costs a dict entry for each key of the shorter run; passing from one run to the next costs about 1 µs.
_JOIN_KEYS_MAX: Final = 64


class _Run:
    """Keys with one mask; ``proven`` says that each is the parent of the next."""

    __slots__ = ("keys", "mask", "number", "proven")

    def __init__(self, number: int, keys: tuple[bytes, ...], mask: int, *, proven: bool) -> None:
        self.number = number
        self.keys = keys
        self.mask = mask
        self.proven = proven


class RunTable:
    """A map from keys to masks that matches chains fast. No I/O, no clock, one thread.

    Attributes:
        dropped_keys: additions ignored because the table was full.

    Args:
        keys_max: keys held at most.
    """

    def __init__(self, keys_max: int) -> None:
        self.dropped_keys = 0
        self._keys_max = keys_max
        self._entries: dict[bytes, int] = {}
        self._runs: dict[int, _Run] = {}
        self._last_number = 0
        self._shared: dict[int, int] = {}
        self._sweep_keys: list[bytes] = []

    def __len__(self) -> int:
        """Keys with a mask."""
        return len(self._entries)

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return len(self._runs)

    # ------------------------------------------------------------------ lookups

    def mask(self, key: bytes) -> int:
        """The mask of ``key``; 0 if it has none."""
        entry = self._entries.get(key, 0)
        return entry if entry >= 0 else self._runs[entry].mask

    def whole(self, chain: Sequence[bytes]) -> int:
        """The one mask of all keys of a chain if its last key shows it, which is so for most chains; else 0.

        If the last key stands in a proven run as far from the start as in the chain, so do all before it: each names
        its whole prefix. So two keys are looked at, however long the chain is.
        """
        count = len(chain)
        entry = self._entries.get(chain[0], 0) if count else 0
        if entry >= 0:
            return 0
        run = self._runs[entry]
        own = run.keys
        return run.mask if run.proven and count <= len(own) and own[count - 1] == chain[count - 1] else 0

    def stretches(self, chain: Sequence[bytes]) -> Iterator[tuple[int, int]]:
        """Walk along a chain, from its start to the first key without a mask.

        Args:
            chain: keys, each the hash of a block and of the key before it.

        Yields:
            A count of consecutive keys, and the one mask they have. Neighbouring stretches may have equal masks. Do
            not change the table before the last one was taken.
        """
        keys = tuple(chain)
        get = self._entries.get
        at, count = 0, len(keys)
        before: _Run | None = None
        while at < count:
            entry = get(keys[at])
            if entry is None:
                return
            if entry > 0:
                length, mask = self._plain_length(keys, at, entry), entry
                before = self._join_plain(before, keys[at : at + length], mask)
            else:
                run = self._runs[entry]
                mask = run.mask
                length, run_after = self._match(run, keys, at)
                before = None if run_after is None else self._join_runs(before, run_after)
            yield length, mask
            at += length

    # ------------------------------------------------------------------ changes

    def add(self, keys: Iterable[bytes], bit: int, *, in_order: bool = True, stale: int = 0) -> int:
        """Set a bit of every key.

        Args:
            keys: keys; those that follow each other in a chain should do so here.
            bit: a mask with one bit.
            in_order: whether neighbours here are likely to be neighbours in a chain.
            stale: bits that may be cleared of these keys on the way: those that are being swept.

        Returns:
            For how many keys the bit was not set before.
        """
        named = tuple(keys)
        if not self._fits(named):
            named = self._fitting(named)
        gained, fresh = self._enter(named, bit, in_order=in_order)
        if fresh == len(named):
            return gained
        if not gained:
            changed = self._set_all(named, bit, stale, in_order=in_order)
            if changed is not None:
                return changed
        entries = self._entries
        at, count = 0, len(named)
        while at < count:
            entry, length = entries[named[at]], 1
            if entry < 0:
                run = self._runs[entry]
                start = _position(run.keys, named[at])
                length = _common(run.keys[start:], named[at:])
                if not run.mask & bit:
                    self._assign(run, start, start + length, run.mask & ~stale | bit)
                    gained += length
            else:
                length = self._plain_length(named, at, entry)
                if not entry & bit:
                    gained += self._set(named[at : at + length], entry & ~stale | bit, in_order=in_order)
            at += length
        return gained

    def discard(self, keys: Iterable[bytes], bit: int) -> int:
        """Clear a bit of every key, in any order; returns for how many it was set."""
        named = tuple(keys)
        entries = self._entries
        lost, at, count = 0, 0, len(named)
        while at < count:
            entry = entries.get(named[at], 0)
            length = 1
            if entry > 0 and entry & bit:
                self._store((named[at],), entry ^ bit)
                lost += 1
            elif entry < 0 and self._runs[entry].mask & bit:
                length = self._discard_from(self._runs[entry], named[at:], bit)
                lost += length
            at += length
        return lost

    def sweep(self, bits: int, budget_keys: int) -> int:
        """Clear bits of every key, looking at up to ``budget_keys`` keys.

        Call it again with the same bits until it returns 0. Keys added meanwhile must not have these bits. The first
        call lists all keys once (about 10 ms at 10^6 keys).

        Returns:
            How many keys remain to be looked at.
        """
        if not self._sweep_keys:
            self._sweep_keys = list(self._entries)
        batch = self._sweep_keys[-budget_keys:]
        del self._sweep_keys[-budget_keys:]
        found = list(map(self._entries.get, batch, repeat(0)))
        for entry in set(found):
            if entry > 0 and entry & bits:
                keys = tuple(key for key, one in zip(batch, found, strict=True) if one == entry)
                if entry & ~bits:
                    self._entries.update(dict.fromkeys(keys, self._share(entry & ~bits)))
                else:
                    self._store(keys, 0)
            elif entry < 0 and self._runs[entry].mask & bits:
                run = self._runs[entry]
                self._assign(run, 0, len(run.keys), run.mask & ~bits)
        if not self._sweep_keys:
            # Masks of ended holders are never asked for again; those in use come back on the next change.
            self._shared.clear()
        return len(self._sweep_keys)

    # ------------------------------------------------------------------ matching

    def _match(self, run: _Run, keys: tuple[bytes, ...], at: int) -> tuple[int, _Run | None]:
        """How many keys from ``at`` on are in ``run``; the run itself if it is proven, entered at its start and used up."""
        start = _position(run.keys, keys[at])
        if not run.proven:
            return self._prove(run, start, keys[at:])
        own = run.keys
        # keys[at] is in the run. If a later key is, so are those in between: each names all before it.
        known, beyond = 1, min(len(own) - start, len(keys) - at) + 1
        if own[start + beyond - 2] == keys[at + beyond - 2]:
            known = beyond - 1
        while beyond - known > 1:
            middle = (known + beyond) // 2
            if own[start + middle - 1] == keys[at + middle - 1]:
                known = middle
            else:
                beyond = middle
        return known, run if start == 0 and known == len(own) else None

    def _prove(self, run: _Run, start: int, keys: tuple[bytes, ...]) -> tuple[int, _Run | None]:
        """Compare an unproven run with a chain, key by key, and keep as proven what agrees."""
        own = run.keys
        length = _common(own[start:], keys)
        if start == 0 and length == len(own):
            run.proven = True
            return length, run
        if length < len(keys) or start:
            # The two part inside the run. A chain that merely ends there says nothing about the rest.
            self._assign(run, start, start + length, run.mask, proven=True)
            now = self._entries[keys[0]]
            if now < 0:
                return length, self._runs[now]
        return length, None

    def _plain_length(self, keys: tuple[bytes, ...], at: int, mask: int) -> int:
        """How many keys from ``at`` on have an entry of their own with this mask."""
        get = self._entries.get
        length, size = 1, _SCAN_KEYS_MIN
        while True:
            entries = list(map(get, keys[at + length : at + length + size]))
            same = entries.count(mask)
            if same < len(entries) or not entries:
                return length + next((n for n, entry in enumerate(entries) if entry != mask), 0)
            length += same
            size = min(size * 4, _SCAN_KEYS_MAX)

    def _join_plain(self, before: _Run | None, keys: tuple[bytes, ...], mask: int) -> _Run | None:
        """Make a run of keys that a chain was just seen to contain, or lengthen the run that it passed before."""
        if before is not None and before.mask == mask:
            self._entries.update(dict.fromkeys(keys, before.number))
            before.keys += keys
            return before
        return self._new_run(keys, mask, proven=True) if len(keys) > 1 else None

    def _join_runs(self, before: _Run | None, run: _Run) -> _Run:
        """Join two proven runs that follow each other, if their masks are equal and one is short."""
        if before is None or before.mask != run.mask or min(len(before.keys), len(run.keys)) > _JOIN_KEYS_MAX:
            return run
        kept, moved = (before, run) if len(before.keys) >= len(run.keys) else (run, before)
        self._entries.update(dict.fromkeys(moved.keys, kept.number))
        kept.keys = before.keys + run.keys
        del self._runs[moved.number]
        return kept

    # ------------------------------------------------------------------ changing

    def _fits(self, keys: tuple[bytes, ...]) -> bool:
        return len(self._entries) + len(keys) <= self._keys_max

    def _fitting(self, keys: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Those keys that have entries, and of the others as many as there is room for."""
        fresh = [key for key in dict.fromkeys(keys) if key not in self._entries]
        refused = set(fresh[self._keys_max - len(self._entries) :])
        self.dropped_keys += len(refused)
        return tuple(key for key in keys if key not in refused)

    def _enter(self, keys: tuple[bytes, ...], bit: int, *, in_order: bool) -> tuple[int, int]:
        """Store those keys that have no entry yet; returns how many, and how many of ``keys`` need nothing more."""
        entries = self._entries
        before = len(entries)
        number = self._last_number - 1
        entry = number if in_order and len(keys) > 1 else self._share(bit)
        # What comes back tells which keys had another entry. One pass, no bytecode per key.
        found = list(map(entries.setdefault, keys, repeat(entry)))
        gained, done = len(entries) - before, found.count(entry)
        if entry == number and gained:
            self._last_number = number
            if gained < len(keys):
                keys = tuple(dict.fromkeys(key for key, one in zip(keys, found, strict=True) if one == number))
            run = self._runs[number] = _Run(number, keys, bit, proven=False)
            self._dissolve(run)
        return gained, done

    def _set_all(self, keys: tuple[bytes, ...], bit: int, stale: int, *, in_order: bool) -> int | None:
        """Set a bit of keys that all have entries of their own and get the same mask; None where that is not so.

        This is what an owner's keys are that came from a snapshot and are announced again.
        """
        found = list(map(self._entries.__getitem__, keys))
        before = set(found)
        after = {mask & ~stale | bit for mask in before}
        if min(before) < 0 or len(after) > 1 or len(set(keys)) < len(keys):
            return None
        if before != after:
            self._set(keys, after.pop(), in_order=in_order)
        return sum(found.count(mask) for mask in before if not mask & bit)

    def _set(self, keys: tuple[bytes, ...], mask: int, *, in_order: bool) -> int:
        """Give keys that have entries of their own another mask, and make them a run if they may be a chain; how many."""
        unique = dict.fromkeys(keys)
        if in_order and len(unique) > 1:
            self._new_run(tuple(unique), mask, proven=False)
        else:
            self._entries.update(dict.fromkeys(unique, self._share(mask)))
        return len(unique)

    def _discard_from(self, run: _Run, keys: tuple[bytes, ...], bit: int) -> int:
        """Clear a bit of as many of ``keys`` as lie together in ``run``, in its order or in reverse."""
        own = run.keys
        start = _position(own, keys[0])
        length = 1
        if start and len(keys) > 1 and own[start - 1] == keys[1]:
            # Caches evict the ends of chains first.
            length = _common(own[start::-1], keys)
            start -= length - 1
        else:
            length = _common(own[start:], keys)
        self._assign(run, start, start + length, run.mask ^ bit)
        return length

    def _assign(self, run: _Run, start: int, stop: int, mask: int, *, proven: bool = False) -> None:
        """Give the keys of ``run`` from ``start`` to ``stop`` another mask; the longest part stays in ``run``."""
        own, was_proven = run.keys, run.proven
        parts = (
            (own[:start], run.mask, was_proven),
            (own[start:stop], mask, was_proven or proven),
            (own[stop:], run.mask, was_proven),
        )
        kept = max(range(3), key=lambda number: len(parts[number][0]))
        for number, (part, part_mask, part_proven) in enumerate(parts):
            if number != kept:
                self._store(part, part_mask, proven=part_proven)
        run.keys, run.mask, run.proven = parts[kept]
        self._dissolve(run)

    def _dissolve(self, run: _Run) -> None:
        """End a run that has one key or no mask."""
        if not run.mask or len(run.keys) == 1:
            del self._runs[run.number]
            self._store(run.keys, run.mask)

    def _store(self, keys: tuple[bytes, ...], mask: int, *, proven: bool = False) -> None:
        """Give keys a mask, or take them out if it is 0."""
        if not mask:
            for key in keys:
                del self._entries[key]
        elif len(keys) > 1:
            self._new_run(keys, mask, proven=proven)
        elif keys:
            self._entries[keys[0]] = self._share(mask)

    def _new_run(self, keys: tuple[bytes, ...], mask: int, *, proven: bool) -> _Run:
        self._last_number -= 1
        number = self._last_number
        run = self._runs[number] = _Run(number, keys, mask, proven=proven)
        self._entries.update(dict.fromkeys(keys, number))
        return run

    def _share(self, mask: int) -> int:
        """One object for all equal masks, so that a key costs no object of its own."""
        return self._shared.setdefault(mask, mask)


def _position(keys: tuple[bytes, ...], key: bytes) -> int:
    """Where a key is that is known to be there; chains are entered at their start and evicted from their end."""
    if keys[0] == key:
        return 0
    if keys[-1] == key:
        return len(keys) - 1
    return keys.index(key)


def _common(left: tuple[bytes, ...], right: tuple[bytes, ...]) -> int:
    """How many keys two sequences have in common from their start."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return list(map(eq, left, right)).index(False)
