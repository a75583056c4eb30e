"""The local copy of the index that routing reads: no I/O, no clock, one event loop.

One dict maps each key to a bit mask of holder slots. A slot is one worker under one epoch; masks are shared objects,
so a key costs its dict entry and its 32 bytes. A chain match is one dict lookup and one AND per block. Ending a
worker retires its slot in O(1): the bits it leaves behind are hidden by a mask of live slots and swept a few keys at
a time, and a slot is used again only after its sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from prismserve.core.types import WorkerInfo
from prismserve.kv_transfer.index.base import EventKind, IndexEvent

_SWEEP_KEYS: Final = 2048
_MATCH_KEYS: Final = 64


@dataclass(slots=True)
class _Holder:
    """One worker under one epoch, and the slot its bits are in."""

    info: WorkerInfo
    epoch: int
    slot: int
    keys: int = 0


class Mirror:
    """Which worker holds which key, as far as known.

    Attributes:
        synced: whether a follower has a snapshot in place and a live connection.
        resyncs: snapshots taken so far.
        dropped_keys: additions ignored because the mirror was full.
        rejected_events: events ignored: an ended or unknown epoch, or an unreadable record.
        on_workers_changed: called after a worker appears, disappears, or changes epoch, state or record.

    Args:
        keys_max: keys held at most, retired ones included.
    """

    def __init__(self, keys_max: int = 8_000_000) -> None:
        self.synced = False
        self.resyncs = 0
        self.dropped_keys = 0
        self.rejected_events = 0
        self.on_workers_changed: Callable[[], None] | None = None
        self._keys_max = keys_max
        self._masks: dict[bytes, int] = {}
        self._shared: dict[int, int] = {}
        self._holders: dict[str, _Holder] = {}
        self._names: list[str] = []
        self._free_slots: list[int] = []
        self._live = 0
        self._retired = 0
        self._sweeping = 0
        self._sweep_keys: list[bytes] = []

    def __len__(self) -> int:
        """Keys in memory, entries of retired holders not yet swept included."""
        return len(self._masks)

    def __contains__(self, key: bytes) -> bool:
        """Whether any live worker holds ``key``."""
        return bool(self._masks.get(key, 0) & self._live)

    # ------------------------------------------------------------------ lookups

    def longest(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Match a chain of keys from its start.

        Returns:
            For every worker that holds at least the first key: how many leading keys it holds.
        """
        found: dict[str, int] = {}
        get = self._masks.get
        same = get(keys[0], 0) if keys else 0
        alive = same & self._live
        if not alive:
            return found
        count = 0
        for start in range(0, len(keys), _MATCH_KEYS):
            masks = list(map(get, keys[start : start + _MATCH_KEYS]))
            # Masks are shared objects and mostly equal along a chain: comparing them here costs no bytecode per key.
            if masks.count(same) == len(masks):
                count += len(masks)
                continue
            for mask in masks:
                still = (mask or 0) & alive
                if still != alive:
                    self._record(found, alive ^ still, count)
                    if not still:
                        return found
                    alive = still
                count += 1
            same = masks[-1] or 0
        self._record(found, alive, count)
        return found

    def holders(self, key: bytes) -> tuple[str, ...]:
        """The workers that hold ``key``, in slot order."""
        mask = self._masks.get(key, 0) & self._live
        names = []
        while mask:
            low = mask & -mask
            names.append(self._names[low.bit_length() - 1])
            mask ^= low
        return tuple(names)

    def workers(self) -> list[WorkerInfo]:
        """The known workers, by id."""
        return [self._holders[name].info for name in sorted(self._holders)]

    def worker(self, worker_id: str) -> WorkerInfo | None:
        """One known worker."""
        holder = self._holders.get(worker_id)
        return None if holder is None else holder.info

    def key_count(self, worker_id: str) -> int:
        """How many keys one worker holds here; 0 when it is unknown."""
        holder = self._holders.get(worker_id)
        return 0 if holder is None else holder.keys

    # ------------------------------------------------------------------ changes

    def add_worker(self, info: WorkerInfo) -> bool:
        """Enter or update a worker. A larger epoch starts without entries; a smaller one is ignored (False)."""
        holder = self._holders.get(info.worker_id)
        if holder is not None and info.epoch == holder.epoch:
            if info != holder.info:
                holder.info = info
                self._changed()
            return True
        if holder is not None and info.epoch < holder.epoch:
            return False
        if holder is not None:
            self._retire(holder.slot)
        self._holders[info.worker_id] = _Holder(info, info.epoch, self._take_slot(info.worker_id))
        self._changed()
        return True

    def remove_worker(self, worker_id: str, epoch: int | None = None) -> bool:
        """Forget a worker and its entries, unless it is known under a larger epoch than ``epoch``."""
        holder = self._holders.get(worker_id)
        if holder is None or (epoch is not None and epoch < holder.epoch):
            return False
        del self._holders[worker_id]
        self._retire(holder.slot)
        self._changed()
        return True

    def add(self, worker_id: str, epoch: int, keys: Iterable[bytes]) -> bool:
        """Add entries of a worker; False when this epoch is not its current one."""
        holder = self._current(worker_id, epoch)
        if holder is None:
            return False
        bit = 1 << holder.slot
        masks, shared = self._masks, self._shared
        alone = shared.setdefault(bit, bit)
        for key in keys:
            mask = masks.get(key)
            if mask is None:
                if len(masks) >= self._keys_max:
                    self.dropped_keys += 1
                    continue
                masks[key] = alone
                holder.keys += 1
            elif not mask & bit:
                union = mask | bit
                masks[key] = shared.setdefault(union, union)
                holder.keys += 1
        return True

    def discard(self, worker_id: str, epoch: int, keys: Iterable[bytes]) -> bool:
        """Remove entries of a worker; False when this epoch is not its current one."""
        holder = self._current(worker_id, epoch)
        if holder is None:
            return False
        bit = 1 << holder.slot
        masks, shared = self._masks, self._shared
        for key in keys:
            mask = masks.get(key, 0)
            if mask & bit:
                holder.keys -= 1
                rest = mask ^ bit
                if rest:
                    masks[key] = shared.setdefault(rest, rest)
                else:
                    del masks[key]
        return True

    def reset(self, worker_id: str, epoch: int, keys: Iterable[bytes] = ()) -> bool:
        """Replace all entries of a worker; False when this epoch is not its current one."""
        holder = self._current(worker_id, epoch)
        if holder is None:
            return False
        if holder.keys:
            self._retire(holder.slot)
            holder.slot = self._take_slot(worker_id)
            holder.keys = 0
        return self.add(worker_id, epoch, keys)

    def apply(self, event: IndexEvent) -> bool:
        """Replay one event; False (and counted) when it is of an ended or unknown epoch."""
        accepted = self._apply(event)
        if not accepted:
            self.rejected_events += 1
        if self._retired or self._sweeping:
            self.sweep(_SWEEP_KEYS + len(event.added))
        return accepted

    def sweep(self, budget_keys: int = _SWEEP_KEYS) -> int:
        """Free what retired holders left behind, looking at up to ``budget_keys`` keys; returns how many remain.

        Starting a sweep lists all keys once (about 10 ms at 10^6 keys).
        """
        if not self._sweep_keys:
            if not self._retired:
                return 0
            self._sweeping, self._retired = self._retired, 0
            self._sweep_keys = list(self._masks)
        masks, shared, keep = self._masks, self._shared, ~self._sweeping
        batch = self._sweep_keys[-budget_keys:]
        del self._sweep_keys[-budget_keys:]
        for key in batch:
            mask = masks.get(key, 0)
            rest = mask & keep
            if rest == mask:
                continue
            if rest:
                masks[key] = shared.setdefault(rest, rest)
            else:
                del masks[key]
        if not self._sweep_keys:
            self._end_sweep()
        return len(self._sweep_keys)

    # ------------------------------------------------------------------ private

    def _apply(self, event: IndexEvent) -> bool:
        worker_id, epoch = event.worker_id, event.epoch
        if event.kind is EventKind.ANNOUNCE:
            return self.add(worker_id, epoch, event.added) and self.discard(worker_id, epoch, event.removed)
        if event.kind is EventKind.RESET:
            return self.reset(worker_id, epoch, event.added)
        if event.kind is EventKind.DROP:
            return self.remove_worker(worker_id, epoch)
        if event.info is None:
            return False
        if event.kind is EventKind.STATE:
            return self._current(worker_id, epoch) is not None and self.add_worker(event.info)
        return self.add_worker(event.info) and self.reset(worker_id, epoch)

    def _current(self, worker_id: str, epoch: int) -> _Holder | None:
        holder = self._holders.get(worker_id)
        return holder if holder is not None and holder.epoch == epoch else None

    def _record(self, found: dict[str, int], mask: int, count: int) -> None:
        while mask:
            low = mask & -mask
            found[self._names[low.bit_length() - 1]] = count
            mask ^= low

    def _take_slot(self, worker_id: str) -> int:
        if self._free_slots:
            slot = self._free_slots.pop()
            self._names[slot] = worker_id
        else:
            slot = len(self._names)
            self._names.append(worker_id)
        self._live |= 1 << slot
        return slot

    def _retire(self, slot: int) -> None:
        self._live &= ~(1 << slot)
        self._retired |= 1 << slot

    def _end_sweep(self) -> None:
        done, self._sweeping = self._sweeping, 0
        while done:
            low = done & -done
            self._free_slots.append(low.bit_length() - 1)
            done ^= low
        # Masks of ended holders are never asked for again; those in use come back on the next change.
        self._shared.clear()

    def _changed(self) -> None:
        if self.on_workers_changed is not None:
            self.on_workers_changed()
