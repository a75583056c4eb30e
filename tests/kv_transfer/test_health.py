from __future__ import annotations

from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.health import LinkHealth

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
