"""Which epochs may be asked back."""

from __future__ import annotations

from dataclasses import replace

from prismserve.kv_transfer.index.claims import Claims


def test_silence_longer_than_a_lease_forfeits_the_epoch(info):
    now = [0.0]
    claims = Claims(10.0, lambda: now[0], lambda: 0.0)
    claims.hold(info(epoch=5))
    now[0] = 10.0
    assert claims.reclaimable("w1") == 5
    now[0] = 20.5
    assert claims.reclaimable("w1") is None
    now[0] = 21.0
    assert claims.reclaimable("w1") is None


def test_calls_that_get_no_answer_are_no_silence(info):
    now = [0.0]
    claims = Claims(10.0, lambda: now[0], lambda: 0.0)
    claims.hold(info(epoch=5))
    for _ in range(6):
        now[0] += 9.0
        assert claims.touch("w1", 5) == info(epoch=5)
    assert claims.reclaimable("w1") == 5


def test_silence_that_the_lease_survived_is_forgiven(info):
    now = [0.0]
    claims = Claims(10.0, lambda: now[0], lambda: 0.0)
    claims.hold(info(epoch=5))
    now[0] = 30.0
    claims.touch("w1", 5)
    claims.renewed("w1", 5)
    assert claims.reclaimable("w1") == 5


def test_the_floor_is_the_largest_of_all_that_is_known_and_never_falls_with_the_wall_clock(info):
    wall = [100.0]
    claims = Claims(10.0, lambda: 0.0, lambda: wall[0])
    assert claims.floor(info()) == 100_000
    claims.saw(200_000)
    wall[0] = -3600.0
    assert claims.floor(info()) == 200_000
    assert claims.floor(info(epoch=300_000)) == 300_000


def test_a_released_claim_is_forgotten(info):
    claims = Claims(10.0, lambda: 0.0)
    held = info(epoch=5)
    claims.hold(held)
    claims.update(replace(held, node="other"))
    assert claims.touch("w1", 5).node == "other"
    claims.release("w1")
    assert claims.reclaimable("w1") is None
    assert claims.touch("w1", 5) is None
