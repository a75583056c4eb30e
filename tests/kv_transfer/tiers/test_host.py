from __future__ import annotations

import pytest
import torch

from prismserve.core.errors import ConfigurationError
from prismserve.kv_transfer.tiers.base import Outcome
from prismserve.kv_transfer.tiers.config import TierConfig
from prismserve.kv_transfer.tiers.eviction import Label
from prismserve.kv_transfer.tiers.host import HostTier
from tests.kv_transfer.tiers.conftest import BLOCK_BYTES, block_of, key_of


def test_a_flipped_bit_is_found_before_use_and_its_slot_retired(config):
    tier = HostTier(config, BLOCK_BYTES)
    tier.put(key_of(1), block_of(1), Label())
    tier._view(tier._slots[key_of(1)])[777] ^= 4
    target = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
    assert tier.get(key_of(1), target) is Outcome.CORRUPT
    assert key_of(1) not in tier
    assert tier.get(key_of(1), target) is Outcome.MISSING
    assert tier.counters.corrupt == 1
    for number in range(10, 20):
        tier.put(key_of(number), block_of(number), Label())
        assert tier.get(key_of(number), target) is Outcome.FOUND
    assert len(tier) == 3


def test_evicted_blocks_are_shown_before_their_memory_is_used_again(config):
    seen = []
    tier = HostTier(config, BLOCK_BYTES, lambda key, block, label: seen.append((key, block.clone(), label)))
    for number in range(6):
        tier.put(key_of(number), block_of(number), Label(cost=float(number)))
    assert [key for key, _, _ in seen] == [key_of(0), key_of(1)]
    assert torch.equal(seen[1][1], block_of(1))
    assert seen[1][2].cost == 1.0


def test_memory_that_cannot_be_had_is_named():
    with pytest.raises(ConfigurationError, match="host_bytes"):
        HostTier(TierConfig(host_bytes=1 << 60), BLOCK_BYTES)


def test_no_memory_is_a_tier_that_is_off():
    tier = HostTier(TierConfig(host_bytes=0), BLOCK_BYTES)
    assert not tier.enabled
    assert tier.put(key_of(1), block_of(1), Label()) == []
