"""Restores from LMCache's local CPU backend; runs in an environment that has it, and speaks lines of JSON.

Started as ``python lmcache_peer.py BLOCK_BYTES BLOCKS``. It stores all blocks, then for every line on its standard input
reads each of them back once and prints ``{"seconds": ...}``. A read is a lookup in the backend and a copy of the chunk
into the memory it is wanted in, which is what its connectors do with what the backend returns.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")

_SPARE_BYTES = 64 << 20


def main() -> None:
    """Store, then restore on demand."""
    block_bytes, blocks = int(sys.argv[1]), int(sys.argv[2])
    import torch
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.memory_allocators.mixed_memory_allocator import MixedMemoryAllocator
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

    torch.set_num_threads(1)
    allocator = MixedMemoryAllocator(blocks * block_bytes + _SPARE_BYTES)
    backend = LocalCPUBackend(LMCacheEngineConfig.from_defaults(), memory_allocator=allocator, dst_device="cpu")
    # (2, layers, tokens, hidden) in its terms; what matters here is how many bytes lie in a chunk.
    shape = torch.Size([2, 1, block_bytes // 8, 1])
    source = torch.randint(0, 1 << 20, (blocks, *shape), dtype=torch.int32).view(torch.float32)
    target = torch.zeros_like(source)
    keys = [CacheEngineKey("benchmark", 1, 0, index, torch.float32) for index in range(blocks)]
    for key, block in zip(keys, source, strict=True):
        chunk = allocator.allocate(shape, torch.float32, MemoryFormat.KV_2LTD)
        chunk.tensor.copy_(block)
        backend.submit_put_task(key, chunk)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for key, block in zip(keys, target, strict=True):
            chunk = backend.get_blocking(key)
            block.copy_(chunk.tensor)
            chunk.ref_count_down()
        seconds = time.perf_counter() - started
        if not torch.equal(source.view(torch.int32), target.view(torch.int32)):
            raise SystemExit("a block came back changed")
        target.zero_()
        print(json.dumps({"seconds": seconds}), flush=True)


main()
