from __future__ import annotations

import pytest
import torch

from prismserve.kv_transfer.tiers.eviction import Label
from prismserve.kv_transfer.tiers.store import TierStore
from tests.kv_transfer.tiers.conftest import BLOCK_BYTES, IDENTITY, block_of, key_of


class Device:
    """Holds blocks by number, and can lose them."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    def copy_block(self, key, target):
        number = int.from_bytes(key, "big")
        if number not in self.held:
            return None
        target.copy_(block_of(number))
        return Label()


@pytest.fixture
def start(config):
    stores = []

    def make(**changes):
        device, events = Device(), []
        store = TierStore(
            config.model_copy(update=changes),
            BLOCK_BYTES,
            IDENTITY,
            device,
            lambda tier, gained, lost: events.append((tier, tuple(gained), tuple(lost))),
        )
        stores.append(store)
        return store, device, events

    yield make
    for store in stores:
        store.close()


def offer(store, device, *numbers):
    device.held.update(numbers)
    store.offer([key_of(number) for number in numbers])
    assert store.drain(10)


def read_run(store, *numbers):
    targets = [torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in numbers]
    found = store.read_run([key_of(number) for number in numbers], targets)
    return found, targets


def test_blocks_sink_to_host_memory_then_to_the_file_and_come_back(start):
    store, device, events = start()
    offer(store, device, *range(10))
    assert len(store.host) == 4
    assert len(store.disk) == 6
    assert store.counters.demoted == 6
    assert [tier.name for tier in store.held_run([key_of(n) for n in (6, 7, 0, 1, 99, 2)])] == [
        "host",
        "host",
        "disk",
        "disk",
    ]
    found, targets = read_run(store, 8, 9, 0, 1, 77)
    assert found == 4
    assert all(torch.equal(target, block_of(n)) for target, n in zip(targets[:4], (8, 9, 0, 1), strict=True))
    assert store.drain(10)
    assert store.counters.promoted == 2
    held = {"host": set(), "disk": set()}
    for tier, gained, lost in events:
        held[tier] |= set(gained)
        held[tier] -= set(lost)
    assert held["host"] == set(store.host.keys())
    assert held["disk"] == set(store.disk.keys())


def test_a_restarted_store_restores_from_the_file(start):
    store, device, _ = start()
    offer(store, device, *range(10))
    kept = {n for n in range(10) if key_of(n) in store.disk}
    store.close()
    again, _, _ = start()
    for number in kept:
        found, (target,) = read_run(again, number)
        assert found == 1
        assert torch.equal(target, block_of(number))


def test_a_corrupt_block_ends_the_run_and_is_announced_as_lost(start):
    store, device, events = start(disk_path=None)
    offer(store, device, 1, 2, 3)
    store.host._view(store.host._slots[key_of(2)])[5] ^= 1
    found, _ = read_run(store, 1, 2, 3)
    assert found == 1
    assert ("host", (), (key_of(2),)) in events
    assert store.host.counters.corrupt == 1


def test_what_leaves_the_device_before_it_is_copied_is_counted_not_kept(start):
    store, _, _ = start()
    store.offer([key_of(1)])
    assert store.drain(10)
    assert store.counters.vanished == 1
    assert store.held_run([key_of(1)]) == []


def test_the_queue_is_bounded(start):
    store, device, _ = start(queue_blocks_max=2)
    device.held.update(range(500))
    store.offer([key_of(n) for n in range(500)])
    assert store.drain(10)
    assert store.counters.overflowed > 0
    assert store.counters.overflowed + store.host.counters.stored + len(store.disk) <= 500 + len(store.disk)


def test_without_host_memory_blocks_go_straight_to_the_file(start):
    store, device, _ = start(host_bytes=0)
    offer(store, device, 1, 2)
    assert len(store.disk) == 2
    assert read_run(store, 1, 2)[0] == 2


def test_without_tiers_nothing_is_taken(start):
    store, device, _ = start(host_bytes=0, disk_path=None)
    offer(store, device, 1)
    assert store.tiers == ()
    assert read_run(store, 1)[0] == 0
