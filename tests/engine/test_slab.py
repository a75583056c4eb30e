from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismserve.core.errors import EngineError, OutOfBlocksError
from prismserve.core.types import KVLayout
from prismserve.engine.pool import KVPool
from prismserve.engine.slab import Slab

LAYOUT = KVLayout("float32", layers=3, kv_heads=1, head_dim=2, block_tokens=2)


def test_a_group_becomes_whole_when_its_last_block_is_given_back() -> None:
    slab = Slab(3)
    assert slab.break_up(5, taken=True) == [15, 16, 17]
    assert slab.free([15, 17]) == []
    assert (slab.free_blocks, slab.freed_groups([16])) == (2, 1)
    assert slab.free([16]) == [5]
    assert (len(slab), slab.free_blocks) == (0, 0)


def test_a_block_taken_again_has_another_tag() -> None:
    slab = Slab(3)
    slab.break_up(0, taken=True)
    before = slab.tag(1)
    slab.free([1])
    assert slab.tag(1) == 0
    assert slab.allocate(1) == [1]
    assert slab.tag(1) not in {0, before}


def test_what_is_not_taken_cannot_be_freed_and_what_is_not_free_not_taken() -> None:
    slab = Slab(3)
    slab.break_up(0, taken=False)
    with pytest.raises(EngineError, match="freed but not taken"):
        slab.free([1])
    with pytest.raises(EngineError, match="broken already"):
        slab.break_up(0, taken=True)
    with pytest.raises(OutOfBlocksError):
        slab.allocate(4)
    with pytest.raises(EngineError, match="not whole"):
        slab.check([])


def test_the_check_finds_a_block_with_two_owners_or_none() -> None:
    slab = Slab(3)
    blocks = slab.break_up(0, taken=True)
    slab.check(blocks)
    with pytest.raises(EngineError, match="two owners"):
        slab.check([*blocks, blocks[0]])
    with pytest.raises(EngineError, match="without an owner"):
        slab.check(blocks[:2])


def test_a_shared_or_listed_group_is_not_broken() -> None:
    pool = KVPool(LAYOUT, 2)
    (group,) = pool.allocate(1)
    pool.retain([group])
    with pytest.raises(EngineError, match="shared or cached"):
        pool.break_up(group)
    pool.free([group])
    pool.list_group(group)
    with pytest.raises(EngineError, match="shared or cached"):
        pool.break_up(group)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["groups", "blocks", "break", "free", "drop"]), st.integers(0, 7))))
def test_groups_and_single_blocks_never_overlap_and_all_come_back(calls) -> None:
    pool = KVPool(LAYOUT, 5)
    groups: list[int] = []
    blocks: list[int] = []
    for name, pick in calls:
        if name == "groups" and pool.can_allocate(pick % 3):
            groups += pool.allocate(pick % 3)
        elif name == "blocks" and pool.groups_for_blocks(pick) <= pool.free_groups:
            blocks += pool.allocate_blocks(pick)
        elif name == "break" and groups:
            blocks += pool.break_up(groups.pop(pick % len(groups)))
        elif name == "free" and blocks:
            pool.free_blocks([blocks.pop(pick % len(blocks))])
        elif name == "drop" and groups:
            pool.free([groups.pop(pick % len(groups))])
        pool.check(dict.fromkeys(groups, 1), blocks)
        memory = [group * 3 + layer for group in groups for layer in range(3)] + blocks
        assert len(set(memory)) == len(memory)
        assert pool.used_groups == len(groups) + len(pool.slab)
    pool.free_blocks(blocks)
    pool.free(groups)
    assert pool.free_groups == 5
