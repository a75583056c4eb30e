"""What every tier must hold."""

from __future__ import annotations

import threading

import torch

from prismserve.kv_transfer.tiers.base import Outcome
from prismserve.kv_transfer.tiers.eviction import Label
from tests.kv_transfer.tiers.conftest import BLOCK_BYTES, block_of, key_of


def read(tier, number: int) -> tuple[Outcome, torch.Tensor]:
    target = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
    return tier.get(key_of(number), target), target


def test_what_was_stored_comes_back_bit_for_bit(tier):
    for number in range(4):
        assert tier.put(key_of(number), block_of(number), Label(cost=2.0)) == []
    for number in range(4):
        outcome, block = read(tier, number)
        assert outcome is Outcome.FOUND
        assert torch.equal(block, block_of(number))
        assert tier.label(key_of(number)) == Label(cost=2.0)
    assert read(tier, 9)[0] is Outcome.MISSING
    assert (tier.counters.hits, tier.counters.misses, tier.counters.stored) == (4, 1, 4)
    assert tier.counters.read_bytes_per_s > 0


def test_a_full_tier_evicts_and_says_what(tier):
    lost = []
    for number in range(20):
        lost += tier.put(key_of(number), block_of(number), Label())
    kept = [number for number in range(20) if key_of(number) in tier]
    assert len(tier) == len(kept) == 20 - len(lost)
    assert {key_of(number) for number in range(20)} - set(lost) == {key_of(number) for number in kept}
    assert kept == list(range(20 - len(kept), 20))
    assert all(torch.equal(read(tier, number)[1], block_of(number)) for number in kept)
    assert tier.counters.evicted == len(lost)


def test_a_key_that_is_held_is_left_as_it_is(tier):
    tier.put(key_of(1), block_of(1), Label())
    assert tier.put(key_of(1), block_of(2), Label()) == []
    assert torch.equal(read(tier, 1)[1], block_of(1))
    assert len(tier) == 1


def test_dropped_blocks_are_gone_and_their_room_is_used_again(tier):
    for round_number in range(30):
        tier.put(key_of(round_number), block_of(round_number), Label())
        tier.drop(key_of(round_number))
        tier.drop(key_of(round_number))
    assert len(tier) == 0
    assert tier.counters.evicted == 0


def test_readers_and_a_writer_at_once_never_see_a_wrong_block(tier):
    wrong: list[int] = []
    stop = threading.Event()

    def reader():
        while not stop.is_set():
            for number in range(12):
                outcome, block = read(tier, number)
                if outcome is Outcome.FOUND and not torch.equal(block, block_of(number)):
                    wrong.append(number)
                elif outcome in (Outcome.CORRUPT, Outcome.FAILED):
                    wrong.append(-1)

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(240):
        tier.put(key_of(number % 12), block_of(number % 12), Label())
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert wrong == []


def test_a_closed_tier_holds_and_takes_nothing(tier):
    tier.put(key_of(1), block_of(1), Label())
    tier.close()
    tier.close()
    assert not tier.enabled
    assert len(tier) == 0
    assert tier.put(key_of(2), block_of(2), Label()) == []
    assert read(tier, 1)[0] is Outcome.MISSING
