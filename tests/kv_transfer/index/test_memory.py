"""What only the in-process index has: its feeds."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from prismserve.core.errors import IndexUnavailableError
from prismserve.kv_transfer.index.memory import MemoryIndex, MemoryStore
from prismserve.kv_transfer.index.mirror import Mirror


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


async def test_a_follower_that_falls_behind_takes_a_new_snapshot(info, config, eventually):
    index = MemoryIndex(config=config.model_copy(update={"stream_events_max": 4}))
    mirror, stop = Mirror(), asyncio.Event()
    task = asyncio.create_task(index.follow(mirror, stop))
    await eventually(lambda: mirror.synced)
    epoch = await index.register(info())
    for number in range(20):
        await index.announce("w1", epoch, [key(number)])
    await eventually(lambda: mirror.key_count("w1") == 20)
    assert mirror.resyncs == 2
    stop.set()
    await task
    assert not index._store.feeds


async def test_a_closed_index_says_so(info):
    index = MemoryIndex()
    await index.close()
    with pytest.raises(IndexUnavailableError, match="closed"):
        await index.register(info())


async def test_fences_are_bounded():
    store = MemoryStore()
    index = MemoryIndex(store)
    for number in range(4200):
        await index.drop_worker(f"w{number}", 1)
    assert len(store.fenced) == 4096
    assert "w4199" in store.fenced
