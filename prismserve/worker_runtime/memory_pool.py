"""The operations of a worker's memory pool as one surface, whoever uses it: requests, tools, tests.

The names are MemServe's (Hu et al., "MemServe: Context Caching for Disaggregated LLM Serving with Elastic Memory Pool",
arXiv:2406.17565, section 4). The pool spans the device, host memory and the file of one worker, and through
:meth:`MemoryPool.transfer` the pools of others; docs/pool.md has the table.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Literal

from prismserve.core.errors import DeadlineExceededError
from prismserve.kv_transfer.index.mirror import PrefixMatch
from prismserve.protocol import worker_pb2 as pb
from prismserve.worker_runtime.jobs import Submission

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from prismserve.core.types import BlockKey, Request
    from prismserve.engine.imports import ImportTicket, PinnedBlocks
    from prismserve.worker_runtime.runtime import WorkerRuntime

Chain = Literal["local", "prefill"]
"""Under which of a request's namespaces: ``prefill`` is the exact one, ``local`` that of its wire codec."""


class MemoryPool:
    """What can be done with the KV blocks of one worker.

    Args:
        runtime: the worker, serving.
    """

    def __init__(self, runtime: WorkerRuntime) -> None:
        self._runtime = runtime

    async def allocate(self, request: Request, blocks: int, chain: Chain = "local") -> ImportTicket:
        """Take device memory for the first blocks of a prompt; what is cached of them is shared, not taken anew.

        The caller fills the rest through ``engine.import_writer`` and ends the ticket with :meth:`insert` or
        :meth:`free`; a request that is cancelled ends it too.

        Raises:
            OverloadedError: too few blocks now.
        """
        return await self._runtime.on_engine(lambda engine: engine.adopt_prefix_begin(request, blocks, worker=chain))

    async def insert(self, ticket: ImportTicket, request: Request) -> None:
        """All blocks of a ticket are written: list them for reuse and tell the index; EngineError if it has ended."""
        await self._runtime.on_engine(lambda engine: engine.adopt_prefix_finish(ticket, request))

    async def free(self, ticket: ImportTicket) -> None:
        """Give a ticket's blocks back; nothing happens if it has ended."""
        await self._runtime.on_engine(lambda engine: engine.abort_import(ticket))

    async def match(self, keys: Sequence[BlockKey]) -> PrefixMatch:
        """How much of a chain lies here, from its start to the first block that no tier has, and in which tiers."""
        held = await self._runtime.on_engine(lambda engine: [engine.held_blocks([key]) > 0 for key in keys])
        store = self._runtime.tiering.store
        counts = {"device": 0, "host": 0, "disk": 0}
        ready = 0
        for number, key in enumerate(keys):
            tier = None if held[number] else store.tier_of(key)
            if not held[number] and tier is None:
                break
            counts["device" if tier is None else tier.name] += 1
            ready += held[number] and ready == number
        return PrefixMatch(counts["device"], counts["host"], counts["disk"], ready)

    @contextlib.asynccontextmanager
    async def pin(self, keys: Sequence[BlockKey]) -> AsyncIterator[PinnedBlocks]:
        """Hold the longest leading run of ``keys`` on the device: within the block it is neither evicted nor deleted."""
        pinned = await self._runtime.on_engine(lambda engine: engine.pin_blocks(keys))
        try:
            yield pinned
        finally:
            await asyncio.shield(self._runtime.on_engine(lambda engine: engine.unpin(pinned.pin_id)))

    async def swap_out(self, keys: Sequence[BlockKey], timeout_s: float = 10.0) -> int:
        """Move a run of blocks from the device into the tiers.

        Returns:
            Blocks that are in a tier and no longer on the device; those in use stay.

        Raises:
            DeadlineExceededError: the tiers did not take them in time; they are still on the device.
        """
        store = self._runtime.tiering.store
        store.offer(keys)
        if not await asyncio.to_thread(store.drain, timeout_s):
            message = f"the tiers did not take {len(keys)} blocks within {timeout_s:g} s"
            raise DeadlineExceededError(message)
        kept = [key for key in keys if store.tier_of(key) is not None]
        return await self._runtime.on_engine(lambda engine: engine.delete_blocks(kept))

    async def swap_in(self, request: Request, chain: Chain = "local") -> int:
        """Bring the prefix of a prompt from the tiers to the device, whatever that takes.

        Returns:
            Tokens brought back.

        Raises:
            OverloadedError: too few blocks now.
            TimeoutError: it took longer than ``tiers.restore_timeout_s``.
        """
        return await self._runtime.tiering.bring_back(request, chain)

    async def transfer(self, request: Request, source: str, blocks: int, chain: Chain = "local") -> int:
        """Bring the first blocks of a prompt from another worker's pool into this one, and insert them.

        Args:
            request: whose prompt it is.
            source: id of the worker that holds them, on its device or in its tiers.
            blocks: how many.
            chain: under which namespace.

        Returns:
            Tokens that were missing here.

        Raises:
            TransferError: the source is gone, does not hold them, or did not send them in time.
            OverloadedError: too few blocks now.
        """
        wanted = Submission(request, pb.JOB_LOCAL, "", 0, source, blocks, ())
        return await self._runtime.exchange.fetch_prefix(wanted, chain)

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        """Forget blocks in every tier; the end of a run goes first.

        Returns:
            Blocks that are nowhere here any more; those that are pinned, in use, or have others after them stay.
        """
        await self._runtime.on_engine(lambda engine: engine.delete_blocks(keys))
        device = await self._runtime.on_engine(lambda engine: {key for key in keys if engine.held_blocks([key])})
        gone = [key for key in keys if key not in device]
        await asyncio.to_thread(self._runtime.tiering.drop, gone)
        return sum(self._runtime.tiering.store.tier_of(key) is None for key in gone)
