"""Restoring a prefix into a KV pool, beside LMCache's local CPU backend, in turns."""

from __future__ import annotations

import contextlib
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
from prismserve.kv_transfer.tiers import host
from prismserve.kv_transfer.tiers.config import TierConfig
from prismserve.kv_transfer.tiers.eviction import Label
from prismserve.kv_transfer.tiers.store import TierStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LMCACHE_STEPS: Final = (("torch",), ("lmcache==0.5.6",))
LAYOUT: Final = KVLayout("float32", 24, 2, 64, 16)
"""KV of the 0.45-billion-parameter model of ``benchmarks.engine``."""
RUN_BLOCKS: Final = 32
OURS: Final = "prismserve"
ONE_THREAD: Final = "prismserve, one thread"
UNCHECKED: Final = "prismserve, one thread, no checksum"
LMCACHE: Final = "lmcache"
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

    Ours reads, verifies the checksum and writes into the pool, as workers do it (``prismserve``), with one thread, and
    with one thread and no checksum; LMCache looks up and copies, with one thread.
    """
    pool = KVPool(LAYOUT, blocks)
    block_bytes = pool.memory.group_bytes
    generator = torch.Generator().manual_seed(2)
    data = torch.randint(0, 256, (blocks, block_bytes), dtype=torch.uint8, generator=generator)
    keys = [index.to_bytes(32, "big") for index in range(blocks)]
    source = _Source(dict(zip(keys, data, strict=True)))
    rates, nbytes = Rates(), blocks * block_bytes
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(_filled(source, keys, nbytes, threads)) for threads in (None, 1)]
        with _without_checksums():
            unchecked = stack.enter_context(_filled(source, keys, nbytes, 1))
        peer = None
        if lmcache_python is not None:
            peer = stack.enter_context(contextlib.closing(_Peer(lmcache_python, block_bytes, blocks)))
        for _ in range(rounds):
            for name, store in zip((OURS, ONE_THREAD), stores, strict=True):
                rates.add(name, nbytes, lambda store=store: _restore(store, pool, keys))  # type: ignore[misc]
                _check_pool(pool, data)
            with _without_checksums():
                rates.add(UNCHECKED, nbytes, lambda: _restore(unchecked, pool, keys))
            if peer is not None:
                rates.rounds.setdefault(LMCACHE, []).append(nbytes / peer.round_s())
    return rates


@contextlib.contextmanager
def _filled(source: _Source, keys: Sequence[bytes], nbytes: int, threads: int | None) -> Iterator[TierStore]:
    """A store that holds all blocks in host memory."""
    config = TierConfig(host_bytes=2 * nbytes, queue_blocks_max=len(keys))
    if threads is not None:
        config = config.model_copy(update={"io_threads": threads})
    store = TierStore(config, nbytes // len(keys), bytes(32), source)
    try:
        store.offer(keys)
        if not store.drain(_STORE_TIMEOUT_S):
            message = "the blocks were not stored in time"
            raise RuntimeError(message)
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """Inside, blocks are copied into and out of host memory without being hashed."""
    before, host.copy_hashed = host.copy_hashed, _copy_only
    try:
        yield
    finally:
        host.copy_hashed = before


def _copy_only(source: torch.Tensor, target: torch.Tensor | None) -> bytes:
    if target is not None:
        target.copy_(source)
    return bytes(16)


def _check_pool(pool: KVPool, data: torch.Tensor) -> None:
    """What was restored is what was stored; the pool is wiped for the next contender."""
    restored = pool.storage.view(len(data), -1).view(torch.uint8)
    if not torch.equal(restored, data):
        message = "a block came back changed"
        raise RuntimeError(message)
    restored.zero_()


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
