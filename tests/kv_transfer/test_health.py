from __future__ import annotations

from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.health import LinkHealth, LinkRate

CONFIG = TransferConfig(link_backoff_s=1.0, link_backoff_max_s=4.0)


def test_a_failed_transport_is_passed_over_and_tried_again_after_its_pause():
    health = LinkHealth(CONFIG)
    health.failed("nixl", 10.0)
    assert health.order(["nixl", "shm"], 10.5) == ["shm", "nixl"]
    assert health.order(["nixl", "shm"], 11.0) == ["nixl", "shm"]


def test_pauses_double_up_to_a_limit_and_a_success_forgets_them():
    health = LinkHealth(CONFIG)
    for _ in range(100):
        health.failed("nixl", 0.0)
    assert health.order(["nixl", "shm"], 3.9) == ["shm", "nixl"]
    assert health.order(["nixl", "shm"], 4.0) == ["nixl", "shm"]
    health.failed("nixl", 4.0)
    health.succeeded("nixl")
    assert health.order(["nixl", "shm"], 4.0) == ["nixl", "shm"]


def test_a_pair_whose_every_transport_failed_is_still_tried_soonest_first():
    health = LinkHealth(CONFIG)
    health.failed("nixl", 0.0)
    health.failed("nixl", 0.0)
    health.failed("shm", 0.5)
    assert health.order(["nixl", "shm"], 0.6) == ["shm", "nixl"]


def test_the_fastest_measured_transport_comes_first_and_a_small_lead_does_not_count():
    health = LinkHealth(TransferConfig())
    assert health.order(["a", "b", "c"], 0.0) == ["a", "b", "c"]
    for name, rate in (("a", 1e9), ("b", 1.2e9)):
        health.rate(name).probed(rate)
    assert health.order(["a", "b", "c"], 0.0) == ["a", "b", "c"]
    health.rate("c").probed(2e9)
    assert health.order(["a", "b", "c"], 0.0) == ["c", "a", "b"]
    health.failed("c", 0.0)
    assert health.order(["a", "b", "c"], 0.0) == ["a", "b", "c"]
    assert LinkHealth(TransferConfig(link_choice="order")).order(["a", "c"], 0.0) == ["a", "c"]


def test_a_rate_follows_real_writes_and_overlapping_ones_are_not_counted_twice():
    rate = LinkRate()
    rate.wrote(1000, 0.0, 1.0)
    assert rate.bytes_per_s == 0.0, "a short write tells of latency"
    rate.wrote(1_000_000, 1.0, 2.0)
    assert rate.bytes_per_s == 1e6
    rate.wrote(1_000_000, 1.0, 3.0)
    assert rate.bytes_per_s == 1e6, "the second of two overlapping writes counts from the end of the first"
    for second in range(3, 40):
        rate.wrote(2_000_000, second, second + 1)
    assert 1.9e6 < rate.bytes_per_s < 2e6
