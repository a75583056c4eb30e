"""The mirror against a naive model, and its fencing, bounds and memory."""

from __future__ import annotations

import hashlib
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prismserve.core.types import KVLayout, Role, WorkerInfo, WorkerState
from prismserve.kv_transfer.index.base import EventKind, IndexEvent
from prismserve.kv_transfer.index.mirror import Mirror

KEYS = [hashlib.sha256(bytes([n])).digest() for n in range(12)]
WORKERS = ["a", "b", "c"]


def record(worker_id: str, epoch: int, state: WorkerState = WorkerState.READY) -> WorkerInfo:
    layout = KVLayout("float32", 1, 1, 8, 16)
    return WorkerInfo(worker_id, Role.MIXED, epoch, 1, "n", "h:1", b"m" * 32, layout, (), b"", state)


key_lists = st.lists(st.sampled_from(KEYS), max_size=8)


class MirrorMachine(RuleBasedStateMachine):
    """Every event sequence leaves the mirror equal to a dict of sets."""

    @initialize()
    def begin(self) -> None:
        self.mirror = Mirror()
        self.model: dict[str, tuple[int, set[bytes]]] = {}

    @rule(worker=st.sampled_from(WORKERS), epoch=st.integers(1, 4))
    def register(self, worker: str, epoch: int) -> None:
        event = IndexEvent(EventKind.REGISTER, worker, epoch, info=record(worker, epoch))
        accepted = self.mirror.apply(event)
        expected = worker not in self.model or epoch >= self.model[worker][0]
        assert accepted == expected
        if expected:
            self.model[worker] = (epoch, set())

    @rule(worker=st.sampled_from(WORKERS), epoch=st.integers(1, 4), added=key_lists, removed=key_lists)
    def announce(self, worker: str, epoch: int, added: list[bytes], removed: list[bytes]) -> None:
        accepted = self.mirror.apply(IndexEvent(EventKind.ANNOUNCE, worker, epoch, added, removed))
        current = worker in self.model and self.model[worker][0] == epoch
        assert accepted == current
        if current:
            self.model[worker][1].update(added)
            self.model[worker][1].difference_update(removed)

    @rule(worker=st.sampled_from(WORKERS), epoch=st.integers(1, 4), added=key_lists)
    def reset(self, worker: str, epoch: int, added: list[bytes]) -> None:
        self.mirror.apply(IndexEvent(EventKind.RESET, worker, epoch, added))
        if worker in self.model and self.model[worker][0] == epoch:
            self.model[worker] = (epoch, set(added))

    @rule(worker=st.sampled_from(WORKERS), epoch=st.integers(1, 4))
    def drop(self, worker: str, epoch: int) -> None:
        self.mirror.apply(IndexEvent(EventKind.DROP, worker, epoch))
        if worker in self.model and self.model[worker][0] <= epoch:
            del self.model[worker]

    @rule(budget=st.integers(1, 5))
    def sweep(self, budget: int) -> None:
        self.mirror.sweep(budget)

    @rule(chain=st.lists(st.sampled_from(KEYS), max_size=200))
    def match(self, chain: list[bytes]) -> None:
        expected = {}
        for worker, (_, held) in self.model.items():
            count = next((n for n, key in enumerate(chain) if key not in held), len(chain))
            if count:
                expected[worker] = count
        assert self.mirror.longest(chain) == expected

    @invariant()
    def agrees(self) -> None:
        for key in KEYS:
            holders = {worker for worker, (_, held) in self.model.items() if key in held}
            assert set(self.mirror.holders(key)) == holders
            assert (key in self.mirror) == bool(holders)
        for worker in WORKERS:
            assert self.mirror.key_count(worker) == len(self.model.get(worker, (0, set()))[1])
        assert [info.worker_id for info in self.mirror.workers()] == sorted(self.model)


MirrorMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestMirrorMachine = MirrorMachine.TestCase


@given(st.integers(1, 70), st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_chains_longer_than_a_machine_word_of_workers_match(workers, length):
    chain = [n.to_bytes(32, "little") for n in range(300)]
    mirror = Mirror()
    for number in range(workers):
        mirror.add_worker(record(f"w{number}", 1))
        mirror.add(f"w{number}", 1, chain[: (length + number) % 301])
    expected = {f"w{n}": (length + n) % 301 for n in range(workers) if (length + n) % 301}
    assert mirror.longest(chain) == expected


def test_a_removed_workers_keys_are_freed_by_sweeping_and_its_slot_is_used_again():
    mirror = Mirror()
    for turn in range(5):
        mirror.add_worker(record("w", turn + 1))
        mirror.add("w", turn + 1, [n.to_bytes(32, "big") for n in range(100)])
        mirror.remove_worker("w")
        assert not mirror.longest([(0).to_bytes(32, "big")])
        while mirror.sweep(10):
            pass
        assert len(mirror) == 0
    assert len(mirror._names) == 1


def test_entries_added_during_a_sweep_are_kept():
    mirror = Mirror()
    keys = [n.to_bytes(32, "big") for n in range(50)]
    mirror.add_worker(record("old", 1))
    mirror.add("old", 1, keys)
    mirror.remove_worker("old")
    mirror.sweep(10)
    mirror.add_worker(record("new", 2))
    mirror.add("new", 2, keys)
    while mirror.sweep(10):
        pass
    assert mirror.longest(keys) == {"new": 50}
    assert mirror.holders(keys[0]) == ("new",)


def test_a_full_mirror_ignores_further_keys_and_counts_them():
    mirror = Mirror(keys_max=3)
    mirror.add_worker(record("w", 1))
    mirror.add("w", 1, KEYS[:5])
    assert len(mirror) == 3
    assert mirror.dropped_keys == 2
    assert mirror.longest(KEYS) == {"w": 3}


def test_a_late_event_of_an_older_epoch_changes_nothing_and_is_counted():
    mirror = Mirror()
    mirror.add_worker(record("w", 5))
    assert not mirror.apply(IndexEvent(EventKind.ANNOUNCE, "w", 4, KEYS[:1]))
    assert not mirror.apply(IndexEvent(EventKind.DROP, "w", 4))
    assert not mirror.apply(IndexEvent(EventKind.REGISTER, "w", 4, info=record("w", 4)))
    assert mirror.rejected_events == 3
    assert mirror.worker("w").epoch == 5
    assert KEYS[0] not in mirror


def test_a_change_of_workers_is_told_once_per_change():
    mirror = Mirror()
    told = []
    mirror.on_workers_changed = lambda: told.append(len(mirror.workers()))
    mirror.add_worker(record("w", 1))
    mirror.add_worker(record("w", 1))
    mirror.add_worker(record("w", 1, WorkerState.DRAINING))
    mirror.add_worker(record("w", 2))
    mirror.remove_worker("w", 1)
    mirror.remove_worker("w", 2)
    assert told == [1, 1, 1, 0]


def test_a_key_costs_a_dict_entry_and_no_object_of_its_own():
    mirror = Mirror()
    for number in range(40):
        mirror.add_worker(record(f"w{number}", 1))
    keys = [n.to_bytes(32, "big") for n in range(20_000)]
    for number in range(40):
        mirror.add(f"w{number}", 1, keys)
    assert len({id(mask) for mask in mirror._masks.values()}) == 1
    assert sys.getsizeof(mirror._masks) / len(keys) < 60
