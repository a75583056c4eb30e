"""One index under one load, in a process of its own: insert, match and memory of the mirror or of a radix tree.

    python probe.py {mirror|radix} BLOCKS

Prints one JSON object. Standard library alone but for the index itself, so that any interpreter can run it: ``mirror``
needs prismserve, ``radix`` needs ai-dynamo-runtime.

Both get the same announcements as the bytes in which they would arrive (ours: msgpack events of 32-byte keys; the
tree's: JSON events of 64-bit hashes), at most 1,024 blocks each, and the same chains to look up, as new objects each
time: a request's keys have just been computed. Half of the blocks are in chains of 2,048, the rest in chains of 128;
each chain has one holder of eight, and every fourth a second one.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

WORKERS: Final = 8
EVENT_BLOCKS: Final = 1024
LOOKUPS: Final = 400
KEY_BYTES: Final = 32
PAGE_BYTES: Final = 4096


@dataclass(frozen=True)
class Chain:
    """A chain by its seed; keys are drawn again each time."""

    seed: int
    blocks: int

    def keys(self) -> tuple[bytes, ...]:
        """Its keys, as new objects."""
        drawn = random.Random(self.seed).randbytes(KEY_BYTES * self.blocks)
        return tuple(drawn[at : at + KEY_BYTES] for at in range(0, len(drawn), KEY_BYTES))

    def holders(self) -> list[int]:
        """The workers that hold it."""
        first = self.seed % WORKERS
        return [first, (first + 3) % WORKERS] if self.seed % 4 == 0 else [first]


def load(blocks: int) -> list[Chain]:
    """The chains of a load, long and short mixed."""
    long = max(1, blocks // 2 // 2048)
    short = (blocks - long * 2048) // 128
    chains = [Chain(n, 2048 if n < long else 128) for n in range(long + short)]
    random.Random(0).shuffle(chains)
    return chains


class MirrorStore:
    """prismserve's mirror."""

    def __init__(self) -> None:
        from prismserve.core.types import KVLayout, Role, WorkerInfo
        from prismserve.kv_transfer.index.events import EventKind, IndexEvent
        from prismserve.kv_transfer.index.mirror import Mirror
        from prismserve.kv_transfer.index.records import decode_event, encode_event

        self._decode = decode_event
        self._encode = lambda worker, keys: encode_event(IndexEvent(EventKind.ANNOUNCE, f"w{worker}", 1, keys))
        self._mirror = Mirror()
        for worker in range(WORKERS):
            layout = KVLayout("float32", 1, 1, 8, 16)
            self._mirror.add_worker(WorkerInfo(f"w{worker}", Role.MIXED, 1, 1, "n", "h:1", b"", layout, (), b""))

    def events(self, worker: int, keys: Sequence[bytes]) -> list[bytes]:
        """A chain as announcements."""
        return [self._encode(worker, keys[at : at + EVENT_BLOCKS]) for at in range(0, len(keys), EVENT_BLOCKS)]

    def apply(self, _worker: int, event: bytes) -> None:
        """Take one announcement."""
        self._mirror.apply(self._decode(event))

    def query(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """The form in which a chain is looked up."""
        return keys

    def match(self, query: Any) -> dict[str, int]:
        """Look a chain up: blocks by holder."""
        return self._mirror.longest(query)


class RadixStore:
    """The radix tree of ai-dynamo-runtime."""

    def __init__(self) -> None:
        from dynamo._core import RadixTree  # type: ignore[import-not-found] # lives in an environment of its own

        self._tree = RadixTree()
        self._count = 0

    def query(self, keys: Sequence[bytes]) -> list[int]:
        """Its hashes have 64 bits."""
        return [int.from_bytes(key[:8], "little") for key in keys]

    def events(self, _worker: int, keys: Sequence[bytes]) -> list[bytes]:
        """A chain as announcements, each naming the block before it."""
        hashes = self.query(keys)
        events = []
        for at in range(0, len(hashes), EVENT_BLOCKS):
            blocks = [{"block_hash": one, "tokens_hash": one} for one in hashes[at : at + EVENT_BLOCKS]]
            stored = {"parent_hash": hashes[at - 1] if at else None, "blocks": blocks}
            self._count += 1
            events.append(json.dumps({"event_id": self._count, "dp_rank": 0, "data": {"stored": stored}}).encode())
        return events

    def apply(self, worker: int, event: bytes) -> None:
        """Take one announcement."""
        self._tree.apply_event(worker, event)

    def match(self, query: Any) -> dict[str, int]:
        """Look a chain up: blocks by holder."""
        return {f"w{worker}": count for (worker, _), count in self._tree.find_matches(query).scores.items()}


def measure(store: MirrorStore | RadixStore, blocks: int) -> dict[str, float]:
    """Insert everything, then look chains up twice: for the first time, and again."""
    chains = load(blocks)
    # So that the first measurement of memory is not one of lazy imports.
    store.match(store.query(Chain(-1, 8).keys()))
    gc.collect()
    memory_before, insert_s, inserted = resident_bytes(), 0.0, 0
    for chain, worker in announcements(chains):
        events = store.events(worker, chain.keys())
        begun_s = time.perf_counter()
        for event in events:
            store.apply(worker, event)
        insert_s += time.perf_counter() - begun_s
        inserted += chain.blocks
    begun_s = time.perf_counter()
    # A tree that takes events in the background has taken all of them when it answers.
    store.match(store.query(chains[-1].keys()))
    insert_s += time.perf_counter() - begun_s
    gc.collect()
    found = {
        "insert_us_per_block": insert_s / inserted * 1e6,
        "memory_bytes_per_block": (resident_bytes() - memory_before) / blocks,
    }
    for length in (128, 2048):
        asked = [chain for chain in chains if chain.blocks == length][:LOOKUPS]
        for name in ("first", "again"):
            repeats = 1 if name == "first" else max(2, LOOKUPS // len(asked))
            times_us = sorted(lookup_us(store, chain) for _ in range(repeats) for chain in asked)
            found[f"match_{length}_{name}_p50_us"] = times_us[len(times_us) // 2]
            found[f"match_{length}_{name}_p99_us"] = times_us[int(len(times_us) * 0.99)]
    return found


def announcements(chains: list[Chain]) -> Iterator[tuple[Chain, int]]:
    """Every chain once for each of its holders."""
    for chain in chains:
        for worker in chain.holders():
            yield chain, worker


def lookup_us(store: MirrorStore | RadixStore, chain: Chain) -> float:
    """Microseconds of one lookup, whose answer must be right."""
    query = store.query(chain.keys())
    begun_s = time.perf_counter()
    answer = store.match(query)
    taken_us = (time.perf_counter() - begun_s) * 1e6
    expected = {f"w{worker}": chain.blocks for worker in chain.holders()}
    if answer != expected:
        message = f"a lookup gave {answer}, not {expected}"
        raise RuntimeError(message)
    return taken_us


def resident_bytes() -> int:
    """Memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def main() -> None:
    """Measure what the command line asks for."""
    stores: dict[str, Callable[[], MirrorStore | RadixStore]] = {"mirror": MirrorStore, "radix": RadixStore}
    print(json.dumps(measure(stores[sys.argv[1]](), int(sys.argv[2]))))


if __name__ == "__main__":
    main()
