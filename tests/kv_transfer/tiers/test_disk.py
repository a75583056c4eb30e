from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from prismserve.core.errors import ConfigurationError
from prismserve.core.types import KVLayout
from prismserve.engine.pool import KVPool
from prismserve.kv_transfer.tiers.base import Outcome
from prismserve.kv_transfer.tiers.disk import DiskTier
from prismserve.kv_transfer.tiers.eviction import Label
from tests.kv_transfer.tiers.conftest import BLOCK_BYTES, IDENTITY, block_of, key_of


def read(tier, number: int) -> tuple[Outcome, torch.Tensor]:
    target = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
    return tier.get(key_of(number), target), target


def fill(config, count: int) -> None:
    tier = DiskTier(config, BLOCK_BYTES, IDENTITY)
    for number in range(count):
        tier.put(key_of(number), block_of(number), Label(owner=b"o" * 16, share=0.25, cost=number + 1.0))
    tier.close()


def path(config) -> Path:
    return Path(config.disk_path) / "blocks-0.kv"


def test_a_restarted_worker_finds_its_blocks_in_their_order(config):
    fill(config, 10)
    tier = DiskTier(config, BLOCK_BYTES, IDENTITY)
    held = len(tier)
    assert 5 <= held < 10
    for number in range(10 - held, 10):
        outcome, block = read(tier, number)
        assert outcome is Outcome.FOUND
        assert torch.equal(block, block_of(number))
        assert tier.label(key_of(number)) == Label(b"o" * 16, 0.25, number + 1.0)
    assert tier.put(key_of(50), block_of(50), Label()) == [key_of(10 - held)]
    tier.close()


def test_the_file_never_grows_beyond_its_size(config):
    fill(config, 40)
    assert path(config).stat().st_size <= config.disk_bytes
    assert path(config).stat().st_mode & 0o777 == 0o600


def test_blocks_of_another_model_or_layout_are_not_found(config):
    fill(config, 3)
    other = DiskTier(config, BLOCK_BYTES, b"j" * 32)
    assert len(other) == 0
    other.put(key_of(1), block_of(1), Label())
    other.close()
    again = DiskTier(config, BLOCK_BYTES, IDENTITY)
    assert len(again) == 0
    again.close()
    shorter = DiskTier(config, BLOCK_BYTES - 4096, IDENTITY)
    assert len(shorter) == 0
    shorter.close()


def test_two_workers_take_two_files(config):
    one, two = DiskTier(config, BLOCK_BYTES, IDENTITY), DiskTier(config, BLOCK_BYTES, IDENTITY)
    one.put(key_of(1), block_of(1), Label())
    two.put(key_of(2), block_of(2), Label())
    assert sorted(file.name for file in Path(config.disk_path).iterdir()) == ["blocks-0.kv", "blocks-1.kv"]
    assert key_of(2) not in one
    one.close()
    two.close()


@pytest.mark.parametrize("where", ["block", "header", "superblock"])
def test_a_flipped_bit_in_the_file_is_found_before_use(config, where):
    fill(config, 3)
    tier = DiskTier(config, BLOCK_BYTES, IDENTITY)
    start = {"block": tier._file._data_start + 5000, "header": 4096 + 8, "superblock": 20}[where]
    tier.close()
    with path(config).open("r+b") as file:
        file.seek(start)
        byte = file.read(1)[0]
        file.seek(start)
        file.write(bytes([byte ^ 16]))
    tier = DiskTier(config, BLOCK_BYTES, IDENTITY)
    outcomes = [read(tier, number) for number in range(3)]
    damaged = {"block": [Outcome.CORRUPT], "header": [Outcome.MISSING], "superblock": [Outcome.MISSING] * 3}[where]
    assert [outcome for outcome, _ in outcomes if outcome is not Outcome.FOUND] == damaged
    for number, (outcome, block) in enumerate(outcomes):
        assert outcome is not Outcome.FOUND or torch.equal(block, block_of(number))
    assert tier.counters.corrupt == (where == "block")
    tier.close()


def test_a_worker_killed_while_writing_leaves_no_torn_block(config):
    script = textwrap.dedent("""
        import sys
        from prismserve.kv_transfer.tiers.config import TierConfig
        from prismserve.kv_transfer.tiers.disk import DiskTier
        from prismserve.kv_transfer.tiers.eviction import Label
        from tests.kv_transfer.tiers.conftest import BLOCK_BYTES, IDENTITY, block_of, key_of
        tier = DiskTier(TierConfig.model_validate_json(sys.argv[1]), BLOCK_BYTES, IDENTITY)
        blocks = [block_of(number) for number in range(40)]
        print("writing", flush=True)
        while True:
            for number, block in enumerate(blocks):
                tier.put(key_of(number), block, Label())
    """)
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for delay_s in (0.05, 0.11):
        process = subprocess.Popen(
            [sys.executable, "-c", script, config.model_dump_json()], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout.readline() == b"writing\n"
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
        tier = DiskTier(config, BLOCK_BYTES, IDENTITY)
        assert len(tier) > 0
        for number in range(40):
            outcome, block = read(tier, number)
            assert outcome in (Outcome.FOUND, Outcome.MISSING)
            assert outcome is Outcome.MISSING or torch.equal(block, block_of(number))
        tier.close()


def failing(error: int):
    def fail(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    return fail


def test_a_failed_read_costs_the_block_and_a_broken_drive_the_tier(config, monkeypatch):
    fill(config, 5)
    tier = DiskTier(config, BLOCK_BYTES, IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(errno.EIO))
        assert read(tier, 4)[0] is Outcome.FAILED
    assert key_of(4) not in tier
    assert read(tier, 3)[0] is Outcome.FOUND
    assert tier.enabled
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(errno.EIO))
        for number in range(3):
            read(tier, number)
    assert not tier.enabled
    assert tier.counters.errors >= 3
    tier.close()


def test_a_full_drive_turns_the_tier_off_and_nothing_else(config, monkeypatch):
    tier = DiskTier(config, BLOCK_BYTES, IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(errno.ENOSPC))
        for number in range(3):
            assert tier.put(key_of(number), block_of(number), Label()) == []
    assert not tier.enabled
    tier.close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
        off = DiskTier(config, BLOCK_BYTES, IDENTITY)
        assert not off.enabled
        off.close()


def test_a_folder_that_cannot_be_used_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="disk_path"):
        DiskTier(config.model_copy(update={"disk_path": str(tmp_path / "file" / "tier")}), BLOCK_BYTES, IDENTITY)
    with pytest.raises(ConfigurationError, match="disk_bytes"):
        DiskTier(config.model_copy(update={"disk_bytes": 9000}), BLOCK_BYTES, IDENTITY)


def page_aligned(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def test_blocks_of_whole_pages_are_read_straight_into_memory_that_begins_with_a_page(config):
    nbytes = 8192
    tier = DiskTier(config, nbytes, IDENTITY)
    blocks = [block_of(number)[:nbytes] for number in range(3)]
    for number, block in enumerate(blocks):
        tier.put(key_of(number), block, Label())
    for scratch in list(tier._scratch.queue):
        scratch.fill_(9)
    memory = page_aligned(2 * nbytes)
    for target in (memory[:nbytes], memory[1 : nbytes + 1], torch.empty(nbytes, dtype=torch.uint8)):
        for number, block in enumerate(blocks):
            assert tier.get(key_of(number), target) is Outcome.FOUND
            assert torch.equal(target, block)
        if target.data_ptr() % 4096 == 0:
            assert all(bool((scratch == 9).all()) for scratch in list(tier._scratch.queue))
    slot = tier._slots[key_of(1)]
    tier._file.write(slot, page_aligned(nbytes))
    assert tier.get(key_of(1), memory[:nbytes]) is Outcome.CORRUPT
    assert key_of(1) not in tier
    tier.close()


def test_a_pool_in_host_memory_gives_the_file_such_memory():
    pool = KVPool(KVLayout("float32", 2, 2, 16, 16), 3)
    views = [pool.memory.group_view(group) for group in range(3)]
    assert all(view.data_ptr() % 4096 == 0 and view.shape[0] == 8192 for view in views)
    views[1].fill_(1)
    assert int(views[0].sum() + views[2].sum()) == 0
