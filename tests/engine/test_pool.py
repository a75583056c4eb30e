from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prismserve.core.errors import EngineError, LeaseExpiredError, OutOfBlocksError
from prismserve.core.types import KVLayout
from prismserve.engine.pool import KVPool

LAYOUT = KVLayout("float32", layers=2, kv_heads=2, head_dim=4, block_tokens=4)


def kv(tokens: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    keys = base + torch.arange(tokens * 8, dtype=torch.float32).view(tokens, 2, 4)
    return keys, -keys


def test_allocation_takes_distinct_blocks_until_none_is_left() -> None:
    pool = KVPool(LAYOUT, 5)
    taken = pool.allocate(3) + pool.allocate(2)
    assert sorted(taken) == [0, 1, 2, 3, 4]
    assert not pool.can_allocate(1)
    with pytest.raises(OutOfBlocksError, match="0 free blocks, 1 are needed"):
        pool.allocate(1)


def test_a_failed_allocation_takes_nothing() -> None:
    pool = KVPool(LAYOUT, 3)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(4)
    assert pool.free_groups == 3


def test_a_shared_block_is_free_only_after_its_last_reference_goes() -> None:
    pool = KVPool(LAYOUT, 2)
    table = pool.allocate(1)
    pool.retain(table)
    pool.free(table)
    assert pool.used_groups == 1
    pool.free(table)
    assert (pool.used_groups, pool.free_groups) == (0, 2)


def test_freeing_or_retaining_a_free_block_is_an_error() -> None:
    pool = KVPool(LAYOUT, 2)
    with pytest.raises(EngineError, match="freed more often"):
        pool.free([0])
    with pytest.raises(EngineError, match="cannot be referenced"):
        pool.retain([0])


def test_what_is_written_is_read_back_at_any_offset() -> None:
    pool = KVPool(LAYOUT, 6)
    table = pool.allocate(4)[::-1]
    keys, values = kv(13, 1.0)
    for start, end in ((0, 3), (3, 9), (9, 13)):
        pool.write(1, table, start, keys[start:end], values[start:end])
    for start, end in ((0, 13), (2, 5), (7, 8), (12, 13), (4, 8), (5, 5)):
        read_keys, read_values = pool.read(1, table, start, end - start)
        assert torch.equal(read_keys, keys[start:end])
        assert torch.equal(read_values, values[start:end])
    assert not pool.storage[:, 0].any()


def test_ranges_outside_the_table_are_refused() -> None:
    pool = KVPool(LAYOUT, 4)
    table = pool.allocate(2)
    with pytest.raises(EngineError, match="do not fit"):
        pool.write(0, table, 6, *kv(3, 0.0))
    with pytest.raises(EngineError, match="do not fit"):
        pool.read(0, table, 0, 9)
    with pytest.raises(EngineError, match="must both be"):
        pool.write(0, table, 0, torch.zeros(2, 2, 4), torch.zeros(2, 1, 4))
    with pytest.raises(EngineError, match="layer 2"):
        pool.read(2, table, 0, 1)


def test_a_late_writer_is_refused_once_its_blocks_were_freed() -> None:
    pool = KVPool(LAYOUT, 2)
    table = pool.allocate(2)
    tags = pool.tags(table)
    pool.write(0, table, 0, *kv(2, 1.0), tags)
    pool.free(table)
    with pytest.raises(LeaseExpiredError):
        pool.write(0, table, 2, *kv(2, 9.0), tags)
    again = pool.allocate(2)
    before = pool.storage.clone()
    with pytest.raises(LeaseExpiredError):
        pool.write(0, table, 0, *kv(8, 9.0), tags)
    assert torch.equal(pool.storage, before)
    assert sorted(again) == sorted(table)


def test_copy_takes_the_leading_tokens_of_every_layer() -> None:
    pool = KVPool(LAYOUT, 2)
    source, target = pool.allocate(2)
    for layer in range(2):
        pool.write(layer, [source], 0, *kv(4, layer + 1.0))
    pool.copy(source, target, 3)
    assert torch.equal(pool.storage[target, :, :, :3], pool.storage[source, :, :, :3])
    assert not pool.storage[target, :, :, 3:].any()


def test_an_idle_listed_block_is_neither_used_nor_free_and_comes_back_by_either_way() -> None:
    pool = KVPool(LAYOUT, 2)
    (group,) = pool.allocate(1)
    pool.list_group(group)
    assert pool.free([group]) == [group]
    assert (pool.used_groups, pool.idle_groups, pool.free_groups) == (0, 1, 1)
    pool.retain([group])
    assert (pool.used_groups, pool.idle_groups) == (1, 0)
    pool.free([group])
    pool.unlist_group(group)
    assert (pool.idle_groups, pool.free_groups) == (0, 2)
    with pytest.raises(EngineError, match="not listed"):
        pool.unlist_group(group)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "free", "list", "unlist"]), st.integers(0, 7))))
def test_counts_and_lists_agree_after_any_sequence_of_calls(calls: list[tuple[str, int]]) -> None:
    pool = KVPool(LAYOUT, 6)
    held: dict[int, int] = {}
    for name, pick in calls:
        known = sorted(held)
        if name == "allocate" and pool.can_allocate(pick % 3):
            for group in pool.allocate(pick % 3):
                held[group] = 1
        elif name == "retain" and known:
            group = known[pick % len(known)]
            pool.retain([group])
            held[group] += 1
        elif name == "free" and known:
            group = known[pick % len(known)]
            pool.free([group])
            held[group] -= 1
            if not held[group]:
                del held[group]
        elif name == "list" and known and not pool.is_listed(known[pick % len(known)]):
            pool.list_group(known[pick % len(known)])
        elif name == "unlist" and pick < 6 and pool.is_listed(pick):
            pool.unlist_group(pick)
        pool.check(held)
        assert pool.used_groups + pool.idle_groups + pool.free_groups == 6


def test_the_check_finds_a_leaked_and_a_stolen_reference() -> None:
    pool = KVPool(LAYOUT, 3)
    table = pool.allocate(2)
    with pytest.raises(EngineError, match="has 1 references, its tables and pins hold 0"):
        pool.check({table[0]: 1})
    pool.check(dict.fromkeys(table, 1))
