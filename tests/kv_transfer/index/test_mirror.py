"""The mirror against a naive model, and its fencing, bounds and memory."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prismserve.core.types import KVLayout, Role, Tier, WorkerInfo, WorkerState
from prismserve.kv_transfer.index.events import EventKind, IndexEvent
from prismserve.kv_transfer.index.mirror import Mirror, PrefixMatch
from tests.kv_transfer.index.chains import CHAINS, KEYS, key_lists, lookups

WORKERS = ["a", "b", "c"]
TIERS = list(Tier)


def record(worker_id: str, epoch: int, state: WorkerState = WorkerState.READY) -> WorkerInfo:
    layout = KVLayout("float32", 1, 1, 8, 16)
    return WorkerInfo(worker_id, Role.MIXED, epoch, 1, "n", "h:1", b"m" * 32, layout, (), b"", state)


class Model:
    """One worker: its epoch, and a set of keys per tier."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.held: dict[Tier, set[bytes]] = {tier: set() for tier in TIERS}

    def tier(self, key: bytes) -> Tier | None:
        return next((tier for tier in TIERS if key in self.held[tier]), None)

    def match(self, chain: list[bytes]) -> PrefixMatch:
        found = []
        for key in chain:
            tier = self.tier(key)
            if tier is None:
                break
            found.append(tier)
        ready = next((number for number, tier in enumerate(found) if tier is not Tier.DEVICE), len(found))
        return PrefixMatch(*(found.count(tier) for tier in TIERS), ready_blocks=ready)


class MirrorMachine(RuleBasedStateMachine):
    """Every event sequence leaves the mirror equal to a dict of sets."""

    @initialize()
    def begin(self) -> None:
        self.mirror = Mirror()
        self.model: dict[str, Model] = {}

    def current(self, worker: str, epoch: int) -> bool:
        return worker in self.model and self.model[worker].epoch == epoch

    @rule(worker=st.sampled_from(WORKERS), epoch=st.integers(1, 3))
    def register(self, worker: str, epoch: int) -> None:
        event = IndexEvent(EventKind.REGISTER, worker, epoch, info=record(worker, epoch))
        expected = worker not in self.model or epoch >= self.model[worker].epoch
        assert self.mirror.apply(event) == expected
        if expected:
            self.model[worker] = Model(epoch)

    @rule(
        worker=st.sampled_from(WORKERS),
        epoch=st.integers(1, 3),
        added=key_lists,
        removed=key_lists,
        tier=st.sampled_from(TIERS),
    )
    def announce(self, worker: str, epoch: int, added: list[bytes], removed: list[bytes], tier: Tier) -> None:
        accepted = self.mirror.apply(IndexEvent(EventKind.ANNOUNCE, worker, epoch, added, removed, tier=tier))
        assert accepted == self.current(worker, epoch)
        if accepted:
            self.model[worker].held[tier] |= set(added)
            self.model[worker].held[tier] -= set(removed)

    @rule(worker=st.sampled_from(WORKERS), epoch=st.integers(1, 3), added=key_lists, tier=st.sampled_from(TIERS))
    def reset(self, worker: str, epoch: int, added: list[bytes], tier: Tier) -> None:
        self.mirror.apply(IndexEvent(EventKind.RESET, worker, epoch, added, tier=tier))
        if self.current(worker, epoch):
            self.model[worker] = Model(epoch)
            self.model[worker].held[tier] |= set(added)

    @rule(worker=st.sampled_from(WORKERS), epoch=st.integers(1, 3))
    def drop(self, worker: str, epoch: int) -> None:
        self.mirror.apply(IndexEvent(EventKind.DROP, worker, epoch))
        if worker in self.model and self.model[worker].epoch <= epoch:
            del self.model[worker]

    @rule(budget=st.integers(1, 5))
    def sweep(self, budget: int) -> None:
        self.mirror.sweep(budget)

    @rule(chain=lookups())
    def match(self, chain: list[bytes]) -> None:
        expected = {worker: model.match(chain) for worker, model in self.model.items()}
        expected = {worker: found for worker, found in expected.items() if found.blocks}
        assert self.mirror.longest(chain) == {worker: found.blocks for worker, found in expected.items()}
        assert self.mirror.match(chain) == expected

    @invariant()
    def agrees(self) -> None:
        for key in KEYS:
            expected = {worker: model.tier(key) for worker, model in self.model.items()}
            expected = {worker: tier for worker, tier in expected.items() if tier is not None}
            assert self.mirror.tiers(key) == expected
            assert set(self.mirror.holders(key)) == set(expected)
            assert (key in self.mirror) == bool(expected)
        for worker in WORKERS:
            held = self.model[worker].held if worker in self.model else {tier: set() for tier in TIERS}
            assert {tier: self.mirror.key_count(worker, tier) for tier in TIERS} == {
                tier: len(keys) for tier, keys in held.items()
            }
            assert self.mirror.key_count(worker) == sum(map(len, held.values()))
        assert [info.worker_id for info in self.mirror.workers()] == sorted(self.model)


MirrorMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestMirrorMachine = MirrorMachine.TestCase


@given(st.integers(1, 70), st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_chains_longer_than_a_machine_word_of_workers_match(workers, length):
    chain = [n.to_bytes(32, "little") for n in range(300)]
    mirror = Mirror()
    for number in range(workers):
        mirror.add_worker(record(f"w{number}", 1))
        mirror.add(f"w{number}", 1, chain[: (length + number) % 301], Tier(number % 3))
    expected = {f"w{n}": (length + n) % 301 for n in range(workers) if (length + n) % 301}
    assert mirror.longest(chain) == expected
    assert {worker: found.blocks for worker, found in mirror.match(chain).items()} == expected


def test_a_block_is_counted_in_the_fastest_tier_that_has_it():
    chain = CHAINS[0]
    mirror = Mirror()
    mirror.add_worker(record("w", 1))
    mirror.add("w", 1, chain[:4])
    mirror.add("w", 1, chain[2:9], Tier.HOST)
    mirror.add("w", 1, chain[:12], Tier.DISK)
    mirror.add("w", 1, chain[10:11])
    assert mirror.match(chain) == {"w": PrefixMatch(5, 5, 2, ready_blocks=4)}
    assert mirror.tiers(chain[3]) == {"w": Tier.DEVICE}
    assert mirror.key_count("w", Tier.HOST) == 7


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
    mirror.add("w", 1, CHAINS[0][:5])
    assert len(mirror) == 3
    assert mirror.dropped_keys == 2
    assert mirror.longest(CHAINS[0]) == {"w": 3}


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
