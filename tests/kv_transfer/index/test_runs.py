"""The table of runs against a plain dict of masks, whatever was added, removed and asked in whatever order."""

from __future__ import annotations

import gc
import random
import sys

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prismserve.kv_transfer.index.runs import RunTable
from tests.kv_transfer.index.chains import CHAINS, KEYS, key_lists, lookups

BITS = [1 << number for number in (0, 1, 5, 70)]


def expand(table: RunTable, chain: list[bytes]) -> list[int]:
    """The masks along a chain, one for each key."""
    return [mask for length, mask in table.stretches(chain) for _ in range(length)]


def long_chain(seed: int, length: int) -> list[bytes]:
    return [random.Random(f"{seed}-{number}").randbytes(32) for number in range(length)]


def check(table: RunTable) -> None:
    """Every key is in exactly one run or has a mask of its own, and every run has keys and a mask."""
    in_runs = {key: run.number for run in table._runs.values() for key in run.keys}
    assert sum(len(run.keys) for run in table._runs.values()) == len(in_runs)
    assert in_runs == {key: entry for key, entry in table._entries.items() if entry < 0}
    assert all(entry for entry in table._entries.values())
    assert all(run.mask > 0 and len(run.keys) > 1 for run in table._runs.values())
    assert all(number == run.number for number, run in table._runs.items())


class TableMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.table = RunTable(10_000)
        self.model: dict[bytes, int] = {}

    @rule(keys=key_lists, bit=st.sampled_from(BITS[:2]), in_order=st.booleans())
    def add_while_sweeping(self, keys: list[bytes], bit: int, in_order: bool) -> None:
        self.table.add(keys, bit, in_order=in_order, stale=BITS[2] | BITS[3])
        self.model = {key: mask & ~(BITS[2] | BITS[3]) for key, mask in self.model.items()}
        self.model = {key: mask for key, mask in self.model.items() if mask}
        for key in keys:
            self.model[key] = self.model.get(key, 0) | bit
        while self.table.sweep(BITS[2] | BITS[3], 3):
            pass

    @rule(keys=key_lists, bit=st.sampled_from(BITS), in_order=st.booleans())
    def add(self, keys: list[bytes], bit: int, in_order: bool) -> None:
        gained = {key for key in keys if not self.model.get(key, 0) & bit}
        assert self.table.add(keys, bit, in_order=in_order) == len(gained)
        for key in keys:
            self.model[key] = self.model.get(key, 0) | bit

    @rule(keys=key_lists, bit=st.sampled_from(BITS))
    def discard(self, keys: list[bytes], bit: int) -> None:
        lost = {key for key in keys if self.model.get(key, 0) & bit}
        assert self.table.discard(keys, bit) == len(lost)
        self.model = {key: mask & ~bit if key in lost else mask for key, mask in self.model.items()}
        self.model = {key: mask for key, mask in self.model.items() if mask}

    @rule(bits=st.sampled_from([BITS[0], BITS[1] | BITS[3]]), budget=st.integers(1, 5))
    def sweep(self, bits: int, budget: int) -> None:
        while self.table.sweep(bits, budget):
            pass
        self.model = {key: mask & ~bits for key, mask in self.model.items() if mask & ~bits}

    @rule(chain=lookups())
    def match(self, chain: list[bytes]) -> None:
        expected = []
        for key in chain:
            if key not in self.model:
                break
            expected.append(self.model[key])
        assert expand(self.table, chain) == expected
        assert expand(self.table, chain) == expected
        whole = self.table.whole(chain)
        assert not whole or [whole] * len(chain) == expected

    @invariant()
    def agrees(self) -> None:
        assert {key: self.table.mask(key) for key in KEYS} == {key: self.model.get(key, 0) for key in KEYS}
        assert len(self.table) == len(self.model)
        check(self.table)


TableMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestTableMachine = TableMachine.TestCase


def test_a_chain_of_one_announcement_is_matched_by_a_few_comparisons_once_it_is_proven():
    table = RunTable(10_000)
    chain = long_chain(1, 2048)
    table.add(chain, 1)
    assert list(table.stretches(chain)) == [(2048, 1)]
    table.add(chain[:1000], 2)
    assert list(table.stretches(chain)) == [(1000, 3), (1048, 1)]
    assert list(table.stretches([*chain[:700], *long_chain(2, 300)])) == [(700, 3)]


def test_of_a_proven_chain_the_last_key_tells_all():
    table = RunTable(10_000)
    chain = long_chain(8, 300)
    table.add(chain, 1)
    assert table.whole(chain) == 0
    assert expand(table, chain) == [1] * 300
    assert table.whole(chain) == table.whole(chain[:7]) == 1
    assert table.whole([*chain, *long_chain(9, 1)]) == 0
    assert table.whole([*chain[:6], *long_chain(9, 1)]) == 0
    table.add(chain[:100], 2)
    assert (table.whole(chain[:100]), table.whole(chain[:101])) == (3, 0)
    assert table.whole([]) == table.whole(long_chain(9, 3)) == 0


def test_blocks_announced_one_by_one_or_without_order_become_one_run_by_being_looked_up():
    table = RunTable(10_000)
    chain = long_chain(3, 500)
    for key in chain[:250]:
        table.add([key], 1)
    shuffled = random.Random(0).sample(chain[250:], 250)
    table.add(shuffled, 1, in_order=False)
    assert table.runs == 0
    assert expand(table, chain) == [1] * 500
    assert table.runs == 1
    assert list(table.stretches(chain)) == [(500, 1)]


def test_keys_of_a_snapshot_become_runs_when_they_are_announced_again_whatever_was_swept_of_them_before():
    table = RunTable(10_000)
    chain = long_chain(6, 400)
    table.add(random.Random(0).sample(chain, 400), 1, in_order=False)
    assert table.sweep(1, 150) == 250
    table.add([key for key in chain if not table.mask(key)], 4, in_order=False)
    assert table.add(chain, 2, stale=5) == 400
    assert table.runs == 1
    assert table.add(chain, 2, stale=5) == 0
    while table.sweep(1, 150):
        pass
    assert list(table.stretches(chain)) == [(400, 2)]


def test_a_run_that_was_no_chain_is_cut_where_the_chains_part():
    table = RunTable(10_000)
    one, two = long_chain(4, 40), long_chain(5, 40)
    table.add([*one, *two], 1)
    assert table.runs == 1
    assert expand(table, two) == [1] * 40
    assert expand(table, [*one, *two[:1]]) == [1] * 41
    assert list(table.stretches(one)) == [(40, 1)]


def test_a_hole_ends_a_chain_wherever_it_is():
    for hole in range(12):
        table = RunTable(10_000)
        chain = CHAINS[0]
        table.add(chain, 1)
        assert expand(table, chain) == [1] * 12
        table.discard([chain[hole]], 1)
        assert expand(table, chain) == [1] * hole
        table.add([chain[hole]], 1)
        assert expand(table, chain) == [1] * 12


def test_an_order_that_hides_a_hole_deceives_nobody():
    table = RunTable(10_000)
    chain, other = CHAINS[0], CHAINS[3]
    table.add([chain[0], other[0], chain[2]], 1)
    assert expand(table, chain) == [1]


def test_keys_beyond_the_limit_are_refused_and_those_that_are_known_are_not():
    table = RunTable(5)
    chain = long_chain(6, 8)
    table.add(chain[:3], 1)
    assert table.add([*chain, chain[7]], 2) == 5
    assert table.dropped_keys == 3
    assert [table.mask(key) for key in chain] == [3, 3, 3, 2, 2, 0, 0, 0]
    check(table)


def test_a_key_costs_a_dict_entry_a_pointer_and_no_object_of_its_own():
    table = RunTable(1_000_000)
    chains = [long_chain(seed, 100) for seed in range(200)]
    for number in range(40):
        for chain in chains:
            table.add(chain, 1 << number)
    assert len({id(entry) for entry in table._entries.values()}) == table.runs == 200
    assert (sys.getsizeof(table._entries) + sum(sys.getsizeof(run.keys) for run in table._runs.values())) / 20_000 < 70


def test_the_garbage_collector_has_nothing_to_visit_in_the_keys():
    table = RunTable(10_000)
    table.add(long_chain(7, 1000), 1)
    gc.collect()
    assert not gc.is_tracked(table._entries)
    assert not any(gc.is_tracked(run.keys) for run in table._runs.values())
