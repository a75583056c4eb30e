from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismserve.core.errors import OutOfBlocksError
from prismserve.core.prompt import Element, block_key, block_keys
from prismserve.core.types import KVLayout
from prismserve.engine.pool import KVPool
from prismserve.engine.prefix_cache import NOBODY, CacheOwner, PrefixCache

BLOCK = 4
LAYOUT = KVLayout("float32", layers=1, kv_heads=1, head_dim=2, block_tokens=BLOCK)
ROOT = b"r" * 32


class Cache:
    """A prefix cache, and sequences that use it the way the engine does."""

    def __init__(self, groups: int) -> None:
        self.pool = KVPool(LAYOUT, groups)
        self.prefix = PrefixCache(self.pool)
        self.tables: dict[int, list[int]] = {}
        self.tokens: dict[tuple[int, ...], None] = {}
        self.next = 0

    def start(self, slots: list[Element], root: bytes = ROOT, owner: CacheOwner = NOBODY) -> int | None:
        """Match, allocate, publish; the id of the sequence, None if there was no room."""
        keys = block_keys(root, slots, BLOCK)
        held = list(self.prefix.match(root, keys, slots, len(slots) - 1).groups)
        self.pool.retain(held)
        try:
            table = held + self.prefix.allocate(self.pool.blocks_for(len(slots)) - len(held), owner)
        except OutOfBlocksError:
            self.prefix.release(held)
            return None
        for index, key in enumerate(keys):
            parent = keys[index - 1] if index else root
            block = slots[index * BLOCK : (index + 1) * BLOCK]
            listed = self.prefix.insert(parent, key, table[index], block, owner)
            if listed != table[index]:
                self.pool.retain([listed])
                self.prefix.release([table[index]])
                table[index] = listed
        self.next += 1
        self.tables[self.next] = table
        return self.next

    def stop(self, name: int) -> None:
        self.prefix.release(self.tables.pop(name))

    def match(self, slots: list[Element], root: bytes = ROOT) -> int:
        return self.prefix.match(root, block_keys(root, slots, BLOCK), slots, len(slots) - 1).tokens

    def check(self) -> None:
        held: dict[int, int] = {}
        for table in self.tables.values():
            for group in table:
                held[group] = held.get(group, 0) + 1
        self.pool.check(held)
        self.prefix.check()


def ids(*values: int) -> list[Element]:
    return list(values)


def test_full_blocks_are_found_again_and_the_last_token_is_left_to_compute() -> None:
    cache = Cache(8)
    cache.stop(cache.start(ids(*range(12))) or 0)
    assert cache.match(ids(*range(12))) == 11
    assert cache.match(ids(*range(13))) == 12
    assert cache.match(ids(*range(9))) == 8


def test_a_partly_equal_next_block_continues_the_match_within_the_block() -> None:
    cache = Cache(8)
    cache.stop(cache.start(ids(0, 1, 2, 3, 4, 5, 6, 7)) or 0)
    slots = ids(0, 1, 2, 3, 4, 5, 99, 98, 97)
    match = cache.prefix.match(ROOT, block_keys(ROOT, slots, BLOCK), slots, len(slots) - 1)
    assert (len(match.groups), match.partial_tokens, match.tokens) == (1, 2, 6)
    assert match.partial_source is not None


def test_the_tail_of_an_image_is_reused_for_another_question() -> None:
    cache = Cache(8)
    image: list[Element] = [(b"k" * 32, offset) for offset in range(6)]
    cache.stop(cache.start([1, *image, 50, 51]) or 0)
    assert cache.match([1, *image, 60, 61, 62]) == 7


def test_the_longest_of_several_partial_children_is_taken() -> None:
    cache = Cache(8)
    for slots in (ids(0, 1, 7, 7), ids(0, 1, 2, 8), ids(0, 9, 9, 9)):
        cache.stop(cache.start([*slots, 5]) or 0)
    assert cache.match(ids(0, 1, 2, 3, 4)) == 3


def test_another_namespace_never_matches() -> None:
    cache = Cache(8)
    cache.stop(cache.start(ids(*range(9))) or 0)
    assert cache.match(ids(*range(9)), b"s" * 32) == 0


def test_the_same_image_under_another_key_never_matches() -> None:
    cache = Cache(8)
    cache.stop(cache.start([(b"a" * 32, 0), (b"a" * 32, 1), (b"a" * 32, 2), (b"a" * 32, 3), 5]) or 0)
    assert cache.match([(b"b" * 32, 0), (b"b" * 32, 1), (b"b" * 32, 2), (b"b" * 32, 3), 5]) == 0


def test_eviction_takes_the_least_recently_used_leaf_and_no_referenced_block() -> None:
    cache = Cache(4)
    first = cache.start(ids(*range(8)))
    second = cache.start(ids(*range(20, 28)))
    assert first is not None
    assert second is not None
    cache.stop(first)
    assert cache.start(ids(*range(40, 44))) is not None
    cache.check()
    assert cache.match(ids(*range(9))) == 4
    assert cache.match(ids(*range(20, 29))) == 8
    assert cache.start(ids(*range(60, 68))) is None
    cache.check()


def test_a_use_protects_from_eviction() -> None:
    cache = Cache(3)
    for base in (0, 10, 20):
        cache.stop(cache.start(ids(*range(base, base + 4))) or 0)
    cache.stop(cache.start(ids(*range(4))) or 0)
    cache.stop(cache.start(ids(*range(30, 34))) or 0)
    assert cache.match(ids(*range(5))) == 4
    assert cache.match(ids(*range(10, 15))) == 0


def test_two_sequences_that_computed_the_same_block_end_up_sharing_it() -> None:
    cache = Cache(8)
    one = cache.start(ids(*range(9)))
    two = cache.start(ids(*range(9)))
    assert one is not None
    assert two is not None
    assert cache.tables[one][:2] == cache.tables[two][:2]
    cache.check()


def test_events_are_the_net_change_since_the_last_drain() -> None:
    cache = Cache(2)
    keys = block_keys(ROOT, ids(*range(8)), BLOCK)
    cache.stop(cache.start(ids(*range(8))) or 0)
    events = cache.prefix.drain_events()
    assert (events.added, events.removed) == (keys, [])
    cache.prefix.clear()
    cache.stop(cache.start(ids(*range(4))) or 0)
    events = cache.prefix.drain_events()
    assert (events.added, events.removed) == ([], [keys[1]])
    assert not cache.prefix.drain_events()


def test_a_run_of_keys_that_leaves_the_chain_is_not_followed() -> None:
    cache = Cache(8)
    cache.stop(cache.start(ids(*range(13))) or 0)
    keys = block_keys(ROOT, ids(*range(12)), BLOCK)
    assert len(cache.prefix.held_run(keys)) == 3
    assert cache.prefix.held_run(keys[1:]) == []
    assert len(cache.prefix.held_run([keys[0], keys[2]])) == 1
    assert len(cache.prefix.held_run([keys[0], keys[0]])) == 1


def test_a_tail_can_be_copied_from_but_is_neither_announced_nor_matched_whole() -> None:
    cache = Cache(4)
    (group,) = cache.prefix.allocate(1)
    tail = ids(1, 2, 3)
    key = block_key(ROOT, tail)
    cache.prefix.insert(ROOT, key, group, tail)
    cache.prefix.release([group])
    cache.check()
    assert (cache.prefix.keys(), cache.prefix.held_run([key])) == ([], [])
    assert cache.match(ids(1, 2, 3, 9, 9)) == 3
    cache.prefix.clear()
    assert not cache.prefix.drain_events()
    assert cache.pool.free_groups == 4


def test_a_disabled_cache_keeps_nothing() -> None:
    pool = KVPool(LAYOUT, 2)
    prefix = PrefixCache(pool, enabled=False)
    (group,) = prefix.allocate(1)
    assert prefix.insert(ROOT, b"k" * 32, group, ids(1, 2, 3, 4)) == group
    prefix.release([group])
    assert (len(prefix), pool.free_groups) == (0, 2)


def test_evicting_more_than_is_idle_is_refused_before_anything_is_evicted() -> None:
    cache = Cache(3)
    cache.stop(cache.start(ids(*range(8))) or 0)
    with pytest.raises(OutOfBlocksError):
        cache.prefix.allocate(4)
    assert len(cache.prefix) == 2


@settings(max_examples=80, deadline=None)
@given(
    st.integers(3, 12),
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 5), st.lists(st.integers(0, 1), min_size=1, max_size=18)), max_size=30
    ),
)
def test_tree_pool_and_tables_agree_after_any_schedule(
    groups: int, schedule: list[tuple[bool, int, list[int]]]
) -> None:
    cache = Cache(groups)
    known: set[bytes] = set()
    for stop, pick, slots in schedule:
        if stop and cache.tables:
            cache.stop(sorted(cache.tables)[pick % len(cache.tables)])
        else:
            cache.start(list(slots))
        cache.check()
        events = cache.prefix.drain_events()
        known = (known | set(events.added)) - set(events.removed)
        assert known == set(cache.prefix.keys())
    for name in list(cache.tables):
        cache.stop(name)
    cache.check()
    assert cache.pool.used_groups == 0
    cache.prefix.clear()
    assert cache.pool.free_groups == groups


def flooded(share: float | None) -> float:
    """Hit rate of a tenant with 4 conversations in turn, while another sends 3 new prompts after each of them."""
    cache = Cache(32)
    modest, greedy = CacheOwner("modest", share or 1.0), CacheOwner("greedy", share or 1.0)
    asked = hit = 0
    for turn in range(60):
        prompt: list[Element] = [100 + turn % 4] * 16
        hit += cache.match(prompt, b"m" * 32) // BLOCK * BLOCK
        asked += len(prompt)
        name = cache.start(prompt, b"m" * 32, modest)
        assert name is not None
        cache.stop(name)
        for extra in range(3):
            name = cache.start([1000 + 3 * turn + extra] * 16, b"g" * 32, greedy)
            assert name is not None
            cache.stop(name)
        cache.check()
        cache.prefix.check()
    return hit / asked


def test_a_tenant_that_floods_the_cache_leaves_others_their_share():
    solo = 56 * 12 / (60 * 16)
    assert flooded(0.5) >= 0.9 * solo
    # What the quota is for: without one, the flood washes the other tenant's conversations out.
    assert flooded(None) < 0.1


def test_what_nobody_else_wants_may_exceed_a_share():
    cache = Cache(16)
    for number in range(4):
        name = cache.start([number] * 16, ROOT, CacheOwner("alone", 0.25))
        assert name is not None
        cache.stop(name)
    assert cache.prefix.held_by("alone") == 16


def test_blocks_in_use_are_not_taken_from_a_tenant_above_its_share():
    cache = Cache(8)
    running = cache.start([1] * 24, ROOT, CacheOwner("busy", 0.25))
    assert running is not None
    assert cache.start([2] * 16, b"o" * 32, CacheOwner("other", 0.5)) is None
    assert cache.match([1] * 24 + [0]) == 24
    cache.stop(running)
    assert cache.start([2] * 16, b"o" * 32, CacheOwner("other", 0.5)) is not None
    cache.prefix.check()
