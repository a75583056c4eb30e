"""Reading and writing the tiers beside the plainest thing the machine can do: memcpy, and O_DIRECT reads of a raw file.

All contenders take turns, round by round, over the same bytes with the same number of threads.
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from prismserve.kv_transfer.tiers.base import Outcome, aligned
from prismserve.kv_transfer.tiers.config import TierConfig
from prismserve.kv_transfer.tiers.disk import DiskTier
from prismserve.kv_transfer.tiers.eviction import OWNER_BYTES, Label
from prismserve.kv_transfer.tiers.host import HostTier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

LABEL: Final = Label(bytes(OWNER_BYTES), 1.0)
IDENTITY: Final = bytes(32)


@dataclass
class Rates:
    """Bytes per second of each contender, by round."""

    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, nbytes: int, work: Callable[[], None]) -> None:
        """Time one round."""
        started = time.perf_counter()
        work()
        self.rounds.setdefault(name, []).append(nbytes / (time.perf_counter() - started))

    def median(self, name: str) -> float:
        """Bytes per second in the median round."""
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over rounds of what two contenders did in the same round: what disturbs one disturbs the other."""
        return statistics.median(a / b for a, b in zip(self.rounds[name], self.rounds[base], strict=True))


def host_rates(block_bytes: int, blocks: int, rounds: int) -> Rates:
    """Memcpy, put and get of host memory.

    Args:
        block_bytes: of a block.
        blocks: so many are copied in each round, more than processor caches hold.
        rounds: how often.
    """
    source = _filled(blocks, block_bytes)
    target = torch.zeros_like(source)
    tier = HostTier(TierConfig(host_bytes=blocks * aligned(block_bytes)), block_bytes)
    rates, nbytes = Rates(), blocks * block_bytes
    keys = _keys(0, blocks)
    _put(tier, keys, source)
    for number in range(1, rounds + 1):
        # A full tier: every put evicts, and no page is touched for the first time.
        fresh = _keys(number, blocks)
        rates.add("memcpy", nbytes, lambda: _copy(source, target))
        rates.add("host put", nbytes, lambda keys=fresh: _put(tier, keys, source))  # type: ignore[misc]
        rates.add("host get", nbytes, lambda keys=fresh: _get(tier, keys, target))  # type: ignore[misc]
        _check(torch.equal(source, target))
    tier.close()
    return rates


def disk_rates(folder: Path, block_bytes: int, blocks: int, rounds: int, threads: int) -> tuple[Rates, bool]:
    """Raw reads and the file tier's; also whether the file system took O_DIRECT."""
    source = _filled(blocks, block_bytes)
    # As a KV pool's blocks lie.
    memory = mmap.mmap(-1, blocks * aligned(block_bytes))
    target = torch.frombuffer(memory, dtype=torch.uint8).view(blocks, -1)[:, :block_bytes]
    target.zero_()
    config = TierConfig(
        disk_path=str(folder),
        disk_bytes=blocks * (aligned(block_bytes) + 128) + (1 << 20),
        io_threads=threads,
    )
    tier = DiskTier(config, block_bytes, IDENTITY)
    keys = _keys(0, blocks)
    rates, nbytes = Rates(), blocks * block_bytes
    rates.add("disk put", nbytes, lambda: _put(tier, keys, source))
    with _raw_file(folder / "raw", source) as (fd, direct), ThreadPoolExecutor(threads) as pool:
        # Into the same memory as the tier's, every block to its place: a few buffers used again would stay in the processor's
        # caches, and no restore ends there.
        step = aligned(block_bytes)
        places = [memoryview(memory)[start : start + step] for start in range(0, blocks * step, step)]

        def raw(index: int) -> None:
            _check(os.preadv(fd, [places[index]], index * step) == step)

        for _ in range(rounds):
            rates.add("raw read", nbytes, lambda: _drain(pool.map(raw, range(blocks))))
            target.zero_()
            rates.add(
                "disk get", nbytes, lambda: _check(all(o is Outcome.FOUND for o in pool.map(tier.get, keys, target)))
            )
            _check(torch.equal(source, target))
            target.zero_()
    tier.close()
    return rates, direct


@contextmanager
def _raw_file(path: Path, source: torch.Tensor) -> Iterator[tuple[int, bool]]:
    """A file with the same blocks, each at a multiple of the alignment, open for direct reads where that is possible."""
    step = aligned(source.shape[1])
    with path.open("wb") as out:
        for block in source:
            out.write(block.numpy().tobytes().ljust(step, b"\0"))
        out.flush()
        os.fsync(out.fileno())
    direct = True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        fd, direct = os.open(path, os.O_RDONLY), False
    try:
        yield fd, direct
    finally:
        os.close(fd)
        path.unlink()


def _filled(blocks: int, block_bytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (blocks, block_bytes), dtype=torch.uint8, generator=generator)


def _keys(number: int, blocks: int) -> list[bytes]:
    return [(number * blocks + index).to_bytes(32, "big") for index in range(blocks)]


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    for one, other in zip(source, target, strict=True):
        other.copy_(one)


def _put(tier: HostTier | DiskTier, keys: Sequence[bytes], source: torch.Tensor) -> None:
    for key, block in zip(keys, source, strict=True):
        tier.put(key, block, LABEL)


def _get(tier: HostTier | DiskTier, keys: Sequence[bytes], target: torch.Tensor) -> None:
    for key, block in zip(keys, target, strict=True):
        _check(tier.get(key, block) is Outcome.FOUND)


def _drain(results: Iterator[None]) -> None:
    for _ in results:
        pass


def _check(ok: bool) -> None:  # noqa: FBT001 - reads as a word
    if not ok:
        message = "a contender did not give back what was stored"
        raise RuntimeError(message)
