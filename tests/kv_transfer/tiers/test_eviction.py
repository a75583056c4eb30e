from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from prismserve.kv_transfer.tiers.eviction import Evictor, Label

ANYBODY = Label()
A, B = Label(owner=b"a" * 16, share=0.5), Label(owner=b"b" * 16, share=0.5)


def keys(*numbers: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in numbers]


def put(evictor: Evictor, key: bytes, label: Label = ANYBODY) -> bytes | None:
    victim = evictor.victim(label)
    if victim is not None:
        evictor.remove(victim)
    evictor.add(key, label)
    return victim


def test_the_least_recently_used_block_leaves_first():
    evictor = Evictor(3, "lru")
    one, two, three, four = keys(1, 2, 3, 4)
    for key in (one, two, three):
        assert put(evictor, key) is None
    evictor.touch([one])
    assert put(evictor, four) == two
    assert evictor.keys() == [three, one, four]


def test_of_a_run_the_end_leaves_first():
    evictor = Evictor(4, "lru")
    run = keys(1, 2, 3, 4)
    for key in run:
        put(evictor, key)
    evictor.touch(run)
    assert [put(evictor, key) for key in keys(5, 6)] == [run[3], run[2]]


def test_what_was_used_often_stays_under_gdsf_and_ages():
    evictor = Evictor(3, "gdsf")
    popular, *others = keys(1, 2, 3)
    put(evictor, popular)
    for _ in range(5):
        evictor.touch([popular])
    for key in others:
        put(evictor, key)
    scans = keys(*range(10, 14))
    assert popular not in [put(evictor, key) for key in scans]
    # Each eviction raises the floor, so fame is lost in the end.
    lost = [put(evictor, key) for key in keys(*range(20, 60))]
    assert popular in lost


def test_what_is_dear_to_compute_stays_longer_under_gdsf():
    evictor = Evictor(2, "gdsf")
    cheap, dear = keys(1, 2)
    put(evictor, dear, Label(cost=8.0))
    put(evictor, cheap, Label(cost=1.0))
    assert put(evictor, keys(3)[0], Label(cost=1.0)) == cheap


def test_a_tenant_above_its_share_loses_its_own_blocks_first():
    evictor = Evictor(4, "lru")
    mine = keys(1, 2)
    for key in mine:
        put(evictor, key, A)
    theirs = keys(*range(10, 30))
    lost = [put(evictor, key, B) for key in theirs]
    assert not set(mine) & set(lost)
    assert all(key in evictor for key in mine)


def test_pinned_blocks_stay():
    evictor = Evictor(2, "lru")
    one, two = keys(1, 2)
    put(evictor, one)
    put(evictor, two)
    assert evictor.victim(Label(), {one}) == two
    assert evictor.victim(Label(), {one, two}) is None
    assert evictor.victim(Label()) == one


@given(st.lists(st.tuples(st.sampled_from(["put", "touch", "remove"]), st.integers(0, 9)), max_size=200))
@settings(max_examples=60)
def test_lru_equals_an_ordered_list(steps):
    evictor, model = Evictor(4, "lru"), []
    for step, number in steps:
        (key,) = keys(number)
        if step == "put" and key not in model:
            victim = put(evictor, key)
            expected = model.pop(0) if len(model) == 4 else None
            assert victim == expected
            model.append(key)
        elif step == "touch" and key in model:
            evictor.touch([key])
            model.remove(key)
            model.append(key)
        elif step == "remove":
            assert evictor.remove(key) == (key in model)
            if key in model:
                model.remove(key)
        assert evictor.keys() == model
