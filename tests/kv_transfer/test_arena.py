from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from prismserve.core.errors import ConfigurationError, LeaseExpiredError, OverloadedError, TransferError, TransportError
from prismserve.kv_transfer.arena import Arena, map_peer
from prismserve.kv_transfer.config import TransferConfig


@pytest.fixture
def arena():
    arena = Arena(TransferConfig(arena_bytes=1 << 20))
    yield arena
    arena.close()


def test_a_peer_sees_what_is_written_and_the_other_way_round(arena):
    extent = arena.allocate(100)
    peer = map_peer(arena.identity())
    start = extent.first_page * arena.page_bytes
    arena.view(extent, 0, 100).copy_(torch.arange(100, dtype=torch.uint8))
    assert peer[start : start + 100].tolist() == list(range(100))
    peer[start] = 77
    assert arena.view(extent, 0, 1).item() == 77


def test_the_arena_has_no_name_and_belongs_to_its_user_alone(arena):
    status = os.fstat(arena.identity().fd)
    assert status.st_mode & 0o777 == 0o600
    assert status.st_nlink == 0
    assert not [entry for entry in Path("/dev/shm").iterdir() if "prismserve" in entry.name]


def test_neither_side_can_truncate_it(arena):
    for size in (0, 4096, 1 << 21):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.identity().fd, size)


@pytest.mark.parametrize("wrong", [{"inode": 1}, {"device": 999_999}, {"nbytes": 4096}, {"fd": 0}, {"pid": 1 << 22}])
def test_a_file_that_is_not_the_described_arena_is_not_mapped(arena, wrong):
    with pytest.raises(TransportError):
        map_peer(arena.identity().model_copy(update=wrong))


def test_a_file_without_seals_is_not_mapped(arena):
    fd = os.memfd_create("other", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 4096)
        status = os.fstat(fd)
        found = {"fd": fd, "inode": status.st_ino, "device": status.st_dev, "nbytes": 4096}
        with pytest.raises(TransportError, match="not the arena"):
            map_peer(arena.identity().model_copy(update=found))
    finally:
        os.close(fd)


def test_views_stay_inside_live_extents(arena):
    extent = arena.allocate(65536)
    for offset, nbytes in [(-1, 2), (65536, 1), (0, 65537), (0, -1)]:
        with pytest.raises(TransferError):
            arena.view(extent, offset, nbytes)
    arena.free(extent)
    with pytest.raises(LeaseExpiredError):
        arena.view(extent, 0, 1)


def test_leases_cannot_starve_the_workers_own_staging(arena):
    arena.allocate(arena.landing_bytes)
    with pytest.raises(OverloadedError):
        arena.allocate(1)
    staging = arena.allocate_staging(65536)
    assert staging.first_page * arena.page_bytes >= arena.landing_bytes
    assert arena.used_staging_pages == 1
    arena.free(staging)


def test_a_closed_arena_says_so(arena):
    extent = arena.allocate(10)
    arena.close()
    arena.close()
    with pytest.raises(TransferError, match="closed"):
        arena.view(extent, 0, 1)


def test_memory_that_cannot_be_had_is_a_configuration_error():
    for nbytes in (1 << 62, 1 << 70):
        with pytest.raises(ConfigurationError, match="arena_bytes"):
            Arena(TransferConfig(arena_bytes=nbytes))


@pytest.mark.parametrize("bad", [{"page_bytes": 5000}, {"page_bytes": 512}, {"arena_bytes": 65536}])
def test_sizes_that_cannot_work_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"page_bytes|arena_bytes"):
        TransferConfig(**bad)
