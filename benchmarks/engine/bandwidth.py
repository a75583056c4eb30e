"""How fast this machine reads memory: the ceiling of decoding, which reads all weights for every token."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch

READ_BYTES: Final = 1 << 30
_REPEATS: Final = 3


def read_bandwidth(threads: int, size_bytes: int = READ_BYTES) -> float:
    """Bytes per second of the fastest of several plain readers over one large array, best of three passes each."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    whole = np.ones(size_bytes // 8, dtype=np.int64)
    integers = torch.from_numpy(whole)
    floats = torch.from_numpy(whole.view(np.float32))
    parts = np.array_split(whole.view(np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        readers: tuple[Callable[[], object], ...] = (
            integers.sum,
            floats.sum,
            floats.max,
            lambda: list(pool.map(lambda part: part.dot(part), parts)),
            lambda: list(pool.map(np.maximum.reduce, parts)),
        )
        fastest_s = min(_fastest_s(reader) for reader in readers)
    torch.set_num_threads(before)
    return whole.nbytes / fastest_s


def _fastest_s(reader: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        reader()
        times.append(time.perf_counter() - began)
    return min(times)
