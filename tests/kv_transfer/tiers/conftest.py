from __future__ import annotations

import pytest
import torch

from prismserve.kv_transfer.tiers.config import TierConfig
from prismserve.kv_transfer.tiers.disk import DiskTier
from prismserve.kv_transfer.tiers.host import HostTier

BLOCK_BYTES = 10_000
IDENTITY = b"i" * 32


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def block_of(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (BLOCK_BYTES,), dtype=torch.uint8, generator=generator)


@pytest.fixture
def config(tmp_path):
    return TierConfig(host_bytes=4 * 12288, disk_path=str(tmp_path / "tier"), disk_bytes=8192 + 8 * 12288, io_threads=2)


@pytest.fixture(params=["host", "disk"])
def tier(request, config):
    made = HostTier(config, BLOCK_BYTES) if request.param == "host" else DiskTier(config, BLOCK_BYTES, IDENTITY)
    yield made
    made.close()
