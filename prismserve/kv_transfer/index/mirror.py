"""The local copy of the index that routing reads: no I/O, no clock, one event loop.

A :class:`~prismserve.kv_transfer.index.runs.RunTable` maps each key to a mask: three bits, one for each tier, for
every slot. A slot is one worker under one epoch. Ending a worker retires its slot in O(1): the bits it leaves behind
are hidden by a mask of live slots and swept a few keys at a time, and a slot is used again only after its sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from prismserve.core.types import Tier, WorkerInfo
from prismserve.kv_transfer.index.events import EventKind, IndexEvent
from prismserve.kv_transfer.index.runs import RunTable

_SWEEP_KEYS: Final = 2048
_GROUPS_MAX: Final = 4096
_TIERS: Final = len(Tier)
_ALL_TIERS: Final = (1 << _TIERS) - 1


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What one worker holds of a chain, from its start to the first block it has in no tier.

    Attributes:
        device_blocks: blocks it has on the device.
        host_blocks: blocks it has in host memory and not on the device.
        disk_blocks: blocks it has on disk alone.
        ready_blocks: leading blocks on the device: what it can use before anything is restored.
    """

    device_blocks: int = 0
    host_blocks: int = 0
    disk_blocks: int = 0
    ready_blocks: int = 0

    @property
    def blocks(self) -> int:
        """All of them."""
        return self.device_blocks + self.host_blocks + self.disk_blocks

    def usable(self, *, restored: bool) -> int:
        """Leading blocks it can use: on the device, or with what is in other tiers restored."""
        return self.blocks if restored else self.ready_blocks


@dataclass(slots=True)
class _Holder:
    """One worker under one epoch, and the slot its bits are in."""

    info: WorkerInfo
    epoch: int
    slot: int
    keys: list[int] = field(default_factory=lambda: [0] * _TIERS)

    def bit(self, tier: Tier) -> int:
        """Its bit for one tier."""
        return 1 << (_TIERS * self.slot + tier)


class Mirror:
    """Which worker holds which key in which tier, as far as known.

    Attributes:
        synced: whether a follower has a snapshot in place and a live connection.
        resyncs: snapshots taken so far.
        rejected_events: events ignored: an ended or unknown epoch, or an unreadable record.
        on_workers_changed: called after a worker appears, disappears, or changes epoch, state or record.

    Args:
        keys_max: keys held at most, retired ones included.
    """

    def __init__(self, keys_max: int = 8_000_000) -> None:
        self.synced = False
        self.resyncs = 0
        self.rejected_events = 0
        self.on_workers_changed: Callable[[], None] | None = None
        self._table = RunTable(keys_max)
        self._holders: dict[str, _Holder] = {}
        self._names: list[str] = []
        self._groups: dict[int, tuple[str, ...]] = {}
        self._free_slots: list[int] = []
        # The lowest bits of slots in use; of retired slots, all bits.
        self._live = 0
        self._retired = 0
        self._sweeping = 0

    def __len__(self) -> int:
        """Keys in memory, entries of retired holders not yet swept included."""
        return len(self._table)

    def __contains__(self, key: bytes) -> bool:
        """Whether any live worker holds ``key``."""
        return bool(self._slots(self._table.mask(key)))

    @property
    def dropped_keys(self) -> int:
        """Additions ignored because the mirror was full."""
        return self._table.dropped_keys

    # ------------------------------------------------------------------ lookups

    def longest(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Match a chain of keys from its start, whatever the tier.

        Args:
            keys: a chain: each key is the hash of a block and of the key before it.

        Returns:
            For every worker that holds at least the first key: how many leading keys it holds.
        """
        whole = self._slots(self._table.whole(keys))
        if whole:
            return dict.fromkeys(self._named(whole), len(keys))
        found: dict[str, int] = {}
        alive, count = self._live, 0
        for length, mask in self._table.stretches(keys):
            still = self._slots(mask) & alive
            if still != alive:
                if count:
                    found.update(dict.fromkeys(self._named(alive ^ still), count))
                if not still:
                    return found
                alive = still
            count += length
        if count:
            found.update(dict.fromkeys(self._named(alive), count))
        return found

    def match(self, keys: Sequence[bytes]) -> dict[str, PrefixMatch]:
        """Match a chain of keys from its start, and say in which tiers; see :meth:`longest`."""
        alive = self._live
        stretches: list[tuple[int, int]] = []
        for length, mask in self._table.stretches(keys):
            alive &= self._slots(mask)
            if not alive:
                break
            stretches.append((length, mask))
        # Slots that are in the first stretches only are among the holders too.
        holders = self._slots(stretches[0][1]) if stretches else 0
        return {self._names[slot]: _summarise(stretches, _TIERS * slot) for slot in _slot_numbers(holders)}

    def holders(self, key: bytes) -> tuple[str, ...]:
        """The workers that hold ``key`` in any tier, in slot order."""
        return self._named(self._slots(self._table.mask(key)))

    def tiers(self, key: bytes) -> dict[str, Tier]:
        """The workers that hold ``key``, and the fastest tier in which each does."""
        mask = self._table.mask(key)
        return {
            self._names[slot]: _fastest(mask >> _TIERS * slot & _ALL_TIERS) for slot in _slot_numbers(self._slots(mask))
        }

    def workers(self) -> list[WorkerInfo]:
        """The known workers, by id."""
        return [self._holders[name].info for name in sorted(self._holders)]

    def worker(self, worker_id: str) -> WorkerInfo | None:
        """One known worker."""
        holder = self._holders.get(worker_id)
        return None if holder is None else holder.info

    def key_count(self, worker_id: str, tier: Tier | None = None) -> int:
        """How many entries one worker has here, in one tier or in all; 0 when it is unknown."""
        holder = self._holders.get(worker_id)
        if holder is None:
            return 0
        return sum(holder.keys) if tier is None else holder.keys[tier]

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

    def add(
        self, worker_id: str, epoch: int, keys: Iterable[bytes], tier: Tier = Tier.DEVICE, *, in_order: bool = True
    ) -> bool:
        """Add entries of a worker; False when this epoch is not its current one.

        ``in_order`` says that chains are given block after block; if they are not, the first match of each is slow.
        """
        holder = self._current(worker_id, epoch)
        if holder is None:
            return False
        stale = self._sweeping | self._retired
        holder.keys[tier] += self._table.add(keys, holder.bit(tier), in_order=in_order, stale=stale)
        return True

    def discard(self, worker_id: str, epoch: int, keys: Iterable[bytes], tier: Tier = Tier.DEVICE) -> bool:
        """Remove entries of a worker; False when this epoch is not its current one."""
        holder = self._current(worker_id, epoch)
        if holder is None:
            return False
        holder.keys[tier] -= self._table.discard(keys, holder.bit(tier))
        return True

    def reset(self, worker_id: str, epoch: int, keys: Iterable[bytes] = (), tier: Tier = Tier.DEVICE) -> bool:
        """Replace all entries of a worker, in all tiers; False when this epoch is not its current one."""
        holder = self._current(worker_id, epoch)
        if holder is None:
            return False
        if any(holder.keys):
            self._retire(holder.slot)
            holder.slot = self._take_slot(worker_id)
            holder.keys = [0] * _TIERS
        return self.add(worker_id, epoch, keys, tier)

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
        if not self._sweeping:
            if not self._retired:
                return 0
            self._sweeping, self._retired = self._retired, 0
        remaining = self._table.sweep(self._sweeping, budget_keys)
        if not remaining:
            self._free_slots += [number // _TIERS for number in _bits(self._sweeping) if number % _TIERS == 0]
            self._sweeping = 0
        return remaining

    # ------------------------------------------------------------------ private

    def _apply(self, event: IndexEvent) -> bool:
        worker_id, epoch, tier = event.worker_id, event.epoch, event.tier
        if event.kind is EventKind.ANNOUNCE:
            return self.add(worker_id, epoch, event.added, tier) and self.discard(worker_id, epoch, event.removed, tier)
        if event.kind is EventKind.RESET:
            return self.reset(worker_id, epoch, event.added, tier)
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

    def _slots(self, mask: int) -> int:
        """The lowest bits of the live slots that have any of their bits in ``mask``."""
        return (mask | mask >> 1 | mask >> 2) & self._live

    def _named(self, slots: int) -> tuple[str, ...]:
        """Names of slots by their lowest bits; there are few sets of holders, and each is asked for often."""
        named = self._groups.get(slots)
        if named is None:
            if len(self._groups) >= _GROUPS_MAX:
                self._groups.clear()
            named = self._groups[slots] = tuple(self._names[slot] for slot in _slot_numbers(slots))
        return named

    def _take_slot(self, worker_id: str) -> int:
        if self._free_slots:
            slot = self._free_slots.pop()
            self._groups.clear()
            self._names[slot] = worker_id
        else:
            slot = len(self._names)
            self._names.append(worker_id)
        self._live |= 1 << _TIERS * slot
        return slot

    def _retire(self, slot: int) -> None:
        self._live &= ~(1 << _TIERS * slot)
        self._retired |= _ALL_TIERS << _TIERS * slot

    def _changed(self) -> None:
        if self.on_workers_changed is not None:
            self.on_workers_changed()


def _bits(mask: int) -> Iterator[int]:
    """Numbers of the bits of a mask, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _slot_numbers(slots: int) -> list[int]:
    """Slots by their lowest bits."""
    return [number // _TIERS for number in _bits(slots)]


def _fastest(tiers: int) -> Tier:
    """The fastest of some tiers, at least one."""
    return Tier((tiers & -tiers).bit_length() - 1)


def _summarise(stretches: Sequence[tuple[int, int]], shift: int) -> PrefixMatch:
    """Count the leading blocks of the slot whose lowest bit is ``shift``, each in its fastest tier."""
    counts = [0] * _TIERS
    ready = 0
    for length, mask in stretches:
        tiers = mask >> shift & _ALL_TIERS
        if not tiers:
            break
        tier = _fastest(tiers)
        if tier is Tier.DEVICE and ready == sum(counts):
            ready += length
        counts[tier] += length
    device, host, disk = counts
    return PrefixMatch(device, host, disk, ready)
