"""Workers are found in the registry, and a registry that does not answer holds nobody up."""

from __future__ import annotations

import asyncio

import pytest

from prismserve.core.errors import WorkerUnavailableError
from prismserve.core.types import KVLayout, Role, WorkerInfo
from prismserve.worker_runtime.peers import PeerDirectory


def info_of(name, epoch=1):
    layout = KVLayout("float32", 1, 1, 8, 16)
    return WorkerInfo(name, Role.DECODE, epoch, 1, "n", "127.0.0.1:1", b"", layout, (), b"")


class Registry:
    def __init__(self, *infos):
        self.infos = infos
        self.answers = asyncio.Event()
        self.answers.set()

    async def workers(self):
        await self.answers.wait()
        return list(self.infos)


async def test_a_known_worker_is_found_at_once_while_the_registry_is_silent():
    now_s = [0.0]
    registry = Registry(info_of("one"))
    peers = PeerDirectory(registry, "secret", lambda: now_s[0])
    first = await peers.find("one", 1)
    registry.answers.clear()
    now_s[0] = 100.0
    async with asyncio.timeout(1):
        for _ in range(3):
            assert await peers.find("one", 1) is first
    registry.infos = (info_of("one", 2),)
    registry.answers.set()
    await asyncio.sleep(0.01)
    assert (await peers.find("one")).info.epoch == 2
    with pytest.raises(WorkerUnavailableError, match="epoch 1"):
        await peers.find("one", 1)
    await peers.close()


async def test_closing_ends_a_refresh_under_way():
    now_s = [0.0]
    registry = Registry(info_of("one"))
    peers = PeerDirectory(registry, "secret", lambda: now_s[0])
    await peers.find("one")
    registry.answers.clear()
    now_s[0] = 100.0
    await peers.find("one")
    async with asyncio.timeout(1):
        await peers.close()
