"""The file below the KV pool lies, fails or has no room: answers stay the same, and the counters say so."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from prismserve.core.types import Role
from prismserve.kv_transfer.tiers.config import TierConfig
from tests.chaos.worlds import ask, call_of

pytestmark = [pytest.mark.chaos, pytest.mark.asyncio(loop_scope="module")]
SCENE = 10_000_900
CACHED = 192


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world: Callable[[], Any], tmp_path_factory: Any) -> AsyncIterator[Any]:
    """One worker whose only tier is a file."""
    made = open_world()
    made.folder = tmp_path_factory.mktemp("tier")
    await made.add(
        Role.MIXED,
        tiers=TierConfig(host_bytes=0, disk_path=str(made.folder), disk_bytes=32 << 20, restore_confidence=0.5),
    )
    await made.open_router()
    yield made


async def sunk(world: Any, scene: int) -> list[int]:
    """Ask, wait until the blocks are in the file, and forget them on the device."""
    (worker,) = world.workers
    token_ids, _ = await ask(world, call_of(scene))
    assert await asyncio.to_thread(worker.tiering.store.drain, 20)
    await forget_device(worker)
    return token_ids


async def forget_device(worker: Any) -> None:
    await worker.on_engine(lambda engine: engine.clear_prefix_cache())
    await worker.on_engine(lambda engine: engine.image_cache.clear())


def whole(worker: Any) -> None:
    worker.engine_loop.call(lambda engine: engine.check_integrity()).result(5)
    stats = worker.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


def flip(data: bytearray, start: int, length: int) -> None:
    data[start + length // 3] ^= 1


def tear(data: bytearray, start: int, length: int) -> None:
    half = length // 2
    data[start + half : start + length] = bytes(length - half)


def damage(world: Any, change: Callable[[bytearray, int, int], None]) -> None:
    """Change every slot of the file behind the worker's back."""
    (worker,) = world.workers
    file = worker.tiering.store.disk._file
    (path,) = world.folder.iterdir()
    data = bytearray(path.read_bytes())
    length = worker.tiering.store.block_bytes
    for slot in set(worker.tiering.store.disk._slots.values()):
        change(data, file._data_start + slot * file.slot_bytes, length)
    with path.open("r+b") as target:
        target.write(data)
        os.fsync(target.fileno())


async def test_undamaged_the_file_spares_the_prefill(world: Any) -> None:
    """What the other tests rely on."""
    (worker,) = world.workers
    expected = await sunk(world, SCENE)
    token_ids, usage = await ask(world, call_of(SCENE))
    assert token_ids == expected
    assert usage.cached_tokens >= CACHED
    assert worker.tiering.restored_tokens >= CACHED


@pytest.mark.parametrize("change", [flip, tear], ids=["one bit of each block", "half of each block"])
async def test_a_damaged_block_of_the_file_is_never_returned(
    world: Any, change: Callable[[bytearray, int, int], None]
) -> None:
    (worker,) = world.workers
    scene = SCENE + 1 + (change is tear)
    expected = await sunk(world, scene)
    corrupt, restored = worker.stats().tier_corrupt_blocks, worker.tiering.restored_tokens
    damage(world, change)
    token_ids, usage = await ask(world, call_of(scene))
    assert token_ids == expected
    assert usage.cached_tokens < 16
    assert worker.tiering.restored_tokens == restored
    assert worker.stats().tier_corrupt_blocks > corrupt
    assert worker.tiering.store.disk.enabled
    whole(worker)
    # The damaged slot is quarantined, and the file goes on: what is stored afterwards comes back intact.
    assert await sunk(world, scene + 100) == (await ask(world, call_of(scene + 100)))[0]
    assert worker.tiering.restored_tokens > restored


def failing(error: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    return fail


async def test_a_drive_that_fails_to_read_costs_the_tier_and_no_request(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (worker,) = world.workers
    scenes = range(SCENE + 10, SCENE + 15)
    expected = {scene: await sunk(world, scene) for scene in scenes}
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(errno.EIO))
        for scene in scenes:
            assert (await ask(world, call_of(scene)))[0] == expected[scene]
    stats = worker.stats()
    assert stats.tier_errors >= 3
    assert stats.tier_disk_blocks == 0
    assert not worker.tiering.store.disk.enabled
    whole(worker)


async def test_a_drive_that_is_full_while_writing_costs_the_tier_and_no_request(
    open_world: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = open_world()
    worker = await world.add(
        Role.MIXED, tiers=TierConfig(host_bytes=0, disk_path=str(tmp_path), disk_bytes=32 << 20, restore_confidence=0.5)
    )
    await world.open_router()
    expected, _ = await ask(world, call_of(SCENE + 20, cache_salt="baseline"))
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    assert (await ask(world, call_of(SCENE + 20)))[0] == expected
    assert await asyncio.to_thread(worker.tiering.store.drain, 20)
    assert worker.stats().tier_errors >= 3
    assert not worker.tiering.store.disk.enabled
    assert (await ask(world, call_of(SCENE + 20)))[0] == expected
    whole(worker)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


async def test_a_drive_that_is_full_from_the_start_turns_the_tier_off(
    open_world: Callable[[], Any], full_disk: Path
) -> None:
    world = open_world()
    tiers = TierConfig(host_bytes=0, disk_path=str(full_disk), disk_bytes=32 << 20, restore_confidence=0.5)
    worker = await world.add(Role.MIXED, tiers=tiers)
    await world.open_router()
    first, _ = await ask(world, call_of(SCENE + 21))
    assert (await ask(world, call_of(SCENE + 21)))[0] == first
    assert not worker.tiering.store.disk.enabled
    assert worker.stats().tier_errors >= 1
    whole(worker)
    await world.close()
    world.router, world.workers = None, []
