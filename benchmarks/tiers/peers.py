"""Restoring a prefix into a KV pool, beside LMCache's local CPU backend, in turns."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from benchmarks.engine.environments import environment
from benchmarks.tiers.stores import LABEL, Rates
from prismserve.core.types import KVLayout
from prismserve.engine.pool import KVPool
from prismserve.kv_transfer.tiers.config import TierConfig
from prismserve.kv_transfer.tiers.eviction import Label
from prismserve.kv_transfer.tiers.store import TierStore

if TYPE_CHECKING:
    from collections.abc import Sequence

LMCACHE_STEPS: Final = (("torch",), ("lmcache==0.5.6",))
LAYOUT: Final = KVLayout("float32", 24, 2, 64, 16)
"""KV of the 0.45-billion-parameter model of ``benchmarks.engine``."""
RUN_BLOCKS: Final = 32
_SCRIPT: Final = Path(__file__).with_name("lmcache_peer.py")
_START_TIMEOUT_S: Final = 300.0
_STORE_TIMEOUT_S: Final = 60.0


class _Source:
    """Blocks as a device would give them."""

    def __init__(self, blocks: dict[bytes, torch.Tensor]) -> None:
        self._blocks = blocks

    def copy_block(self, key: bytes, target: torch.Tensor) -> Label | None:
        """See :class:`prismserve.kv_transfer.tiers.store.BlockSource`."""
        target.copy_(self._blocks[key])
        return LABEL


def restore_rates(blocks: int, rounds: int, lmcache_python: Path | None) -> Rates:
    """Bytes per second of restoring all blocks, in runs, from host memory into a pool; LMCache's if it is there.

    Ours reads, verifies the checksum and writes into the pool; LMCache looks up and copies.
    """
    pool = KVPool(LAYOUT, blocks)
    block_bytes = pool.memory.group_bytes
    generator = torch.Generator().manual_seed(2)
    data = torch.randint(0, 256, (blocks, block_bytes), dtype=torch.uint8, generator=generator)
    keys = [index.to_bytes(32, "big") for index in range(blocks)]
    store = TierStore(
        TierConfig(host_bytes=2 * blocks * block_bytes, queue_blocks_max=blocks),
        block_bytes,
        bytes(32),
        _Source(dict(zip(keys, data, strict=True))),
    )
    store.offer(keys)
    if not store.drain(_STORE_TIMEOUT_S):
        message = "the blocks were not stored in time"
        raise RuntimeError(message)
    rates = Rates()
    peer = None if lmcache_python is None else _Peer(lmcache_python, block_bytes, blocks)
    try:
        for _ in range(rounds):
            rates.add("prismserve", blocks * block_bytes, lambda: _restore(store, pool, keys))
            if peer is not None:
                rates.rounds.setdefault("lmcache", []).append(blocks * block_bytes / peer.round_s())
    finally:
        store.close()
        if peer is not None:
            peer.close()
    return rates


def lmcache_environment(folder: Path) -> Path:
    """The interpreter of an environment with LMCache."""
    return environment(folder, *LMCACHE_STEPS)


def _restore(store: TierStore, pool: KVPool, keys: Sequence[bytes]) -> None:
    for first in range(0, len(keys), RUN_BLOCKS):
        run = keys[first : first + RUN_BLOCKS]
        views = [pool.memory.group_view(first + index) for index in range(len(run))]
        found = store.read_run(run, [view for view in views if view is not None])
        if found != len(run):
            message = f"only {found} of {len(run)} blocks came back"
            raise RuntimeError(message)


class _Peer:
    """The process with LMCache."""

    def __init__(self, python: Path, block_bytes: int, blocks: int) -> None:
        self._process = subprocess.Popen(
            [str(python), str(_SCRIPT), str(block_bytes), str(blocks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._read().get("ready"):
            if time.monotonic() > deadline:
                message = "LMCache did not start in time"
                raise RuntimeError(message)

    def round_s(self) -> float:
        """Seconds of one round."""
        if self._process.stdin is None:
            message = "LMCache's process has no standard input"
            raise RuntimeError(message)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait(10.0)

    def _read(self) -> dict[str, float]:
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            message = "LMCache's process has ended; its local CPU backend does not run here"
            raise RuntimeError(message)
        found: dict[str, float] = json.loads(line) if line.startswith("{") else {}
        return found
