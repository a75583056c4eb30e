"""A worker's tiers at work: published blocks sink, and the prefix of a request comes back where that is cheaper."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Literal

import torch

from prismserve.core.errors import PrismServeError
from prismserve.core.hashing import digest
from prismserve.core.prompt import block_keys, elements
from prismserve.core.types import Tier
from prismserve.engine.pool import KVPool
from prismserve.kv_transfer.tiers.eviction import OWNER_BYTES, Label
from prismserve.kv_transfer.tiers.restore import Restore, decide
from prismserve.kv_transfer.tiers.store import TierStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prismserve.core.types import Request
    from prismserve.engine.engine import Engine, ImportTicket
    from prismserve.kv_transfer.tiers.config import TierConfig
    from prismserve.worker_runtime.jobs import Submission
    from prismserve.worker_runtime.runtime import WorkerRuntime

logger = logging.getLogger(__name__)

_BY_NAME = {"host": Tier.HOST, "disk": Tier.DISK}


class EngineBlocks:
    """The engine as the tiers see it; see :class:`prismserve.kv_transfer.tiers.store.BlockSource`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def copy_block(self, key: bytes, target: torch.Tensor) -> Label | None:
        """Copy a cached block and label it with its tenant."""
        owner = self._engine.copy_block(key, target)
        if owner is None:
            return None
        name = digest("tier-owner", owner.name.encode())[:OWNER_BYTES] if owner.name else bytes(OWNER_BYTES)
        return Label(name, owner.share)


class Tiering:
    """The tiers of one worker.

    Args:
        runtime: the worker; its engine is built, its index may not be there yet.
        config: sizes and limits.
        on_change: called with (tier, gained, lost), on any thread.

    Attributes:
        store: the tiers themselves.
        restored_tokens: tokens that did not have to be prefilled thanks to the tiers.
        misses: restores that came to nothing.
    """

    def __init__(
        self,
        runtime: WorkerRuntime,
        config: TierConfig,
        on_change: Callable[[Tier, Sequence[bytes], Sequence[bytes]], None],
    ) -> None:
        engine = runtime.engine
        identity = digest("tier", runtime.model.fingerprint, engine.layout.fingerprint())
        self._runtime = runtime
        self._config = config
        self.store = TierStore(
            config,
            engine.group_bytes,
            identity,
            EngineBlocks(engine),
            lambda name, gained, lost: on_change(_BY_NAME[name], gained, lost),
        )
        self.restored_tokens = 0
        self.misses = 0
        self._writing: set[asyncio.Future[int]] = set()

    def held(self) -> dict[Tier, list[bytes]]:
        """Every key held, by tier."""
        return {_BY_NAME[tier.name]: tier.keys() for tier in self.store.tiers}

    def rates(self) -> dict[str, float]:
        """Measured bytes per second of reading, by tier, where 0 stands for a tier that was not read yet."""
        return {tier.name: tier.counters.read_bytes_per_s for tier in self.store.tiers}

    def stats(self) -> dict[str, int]:
        """The figures of :class:`prismserve.core.types.WorkerStats` that are the tiers'."""
        host, disk = self.store.host, self.store.disk
        tiers = [tier for tier in (host, disk) if tier is not None]
        return {
            "tier_host_blocks": len(host),
            "tier_disk_blocks": 0 if disk is None else len(disk),
            "tier_restored_tokens": self.restored_tokens,
            "tier_corrupt_blocks": sum(tier.counters.corrupt for tier in tiers),
            "tier_errors": sum(tier.counters.errors for tier in tiers),
        }

    async def restore(self, submission: Submission, worker: Literal["local", "prefill"]) -> int:
        """Bring back the prefix of a request that the device no longer holds; never fails the request.

        Returns:
            Tokens brought back.
        """
        runtime, request = self._runtime, submission.request
        if submission.skip_restore or not self.store.tiers or not runtime.config.engine.prefix_caching:
            return 0
        size = runtime.engine.layout.block_tokens
        namespace = request.namespace if worker == "prefill" else request.wire_namespace
        slots = elements(request.prompt, request.resume_token_ids)
        keys = list(block_keys(namespace, slots, size))[: max(0, len(slots) - 1) // size]
        # Asked without waiting for the engine: a request that finds nothing here must not wait for a step to end.
        plan = self._plan(keys, runtime.engine.held_blocks(keys))
        if not plan.worth_it:
            return 0
        try:
            taken = await self._bring_back(submission, worker, keys, plan)
        except (PrismServeError, TimeoutError) as error:
            self.misses += 1
            logger.info("request %s: nothing was restored: %s", request.request_id, str(error) or "it took too long")
            return 0
        self.restored_tokens += taken * size
        self.misses += taken == 0
        return taken * size

    def _plan(self, keys: Sequence[bytes], first: int) -> Restore:
        engine = self._runtime.engine
        run = self.store.held_run(keys[first:])
        return decide(
            first=first,
            tiers=[tier.name for tier in run],
            block_bytes=self.store.block_bytes,
            block_tokens=engine.layout.block_tokens,
            bytes_per_s=self.rates(),
            prefill_tokens_per_s=engine.stats().prefill_tokens_per_s,
            blocks_min=self._config.restore_blocks_min,
        )

    async def _bring_back(
        self, submission: Submission, worker: Literal["local", "prefill"], keys: Sequence[bytes], plan: Restore
    ) -> int:
        request, size = submission.request, self._runtime.engine.layout.block_tokens
        ticket, targets = await self._runtime.on_engine(
            lambda engine: _begin(engine, request, plan.first + plan.blocks, worker)
        )
        held = ticket.cached_tokens // size
        wanted = keys[held : len(ticket.table)]
        if held < plan.first or not wanted:
            await self._runtime.on_engine(lambda engine: _end(engine, ticket, targets, 0))
            return 0
        if targets is None:
            # The pool cannot be written from here: read first, and let the engine copy.
            await self._runtime.on_engine(lambda engine: engine.abort_import(ticket))
            staged = list(torch.empty(len(wanted), self.store.block_bytes, dtype=torch.uint8).unbind(0))
            reading = asyncio.to_thread(self.store.read_run, wanted, staged)
            found = await asyncio.wait_for(reading, self._config.restore_timeout_s)
            return await self._runtime.on_engine(
                lambda engine: engine.adopt_blocks(request, held, staged[:found], worker=worker) if found else 0
            )
        written = asyncio.ensure_future(self._write(ticket, wanted, targets))
        self._writing.add(written)
        written.add_done_callback(self._written)
        # A request that has waited long enough goes on without its blocks; the thread that writes them does not stop.
        return await asyncio.wait_for(asyncio.shield(written), self._config.restore_timeout_s)

    async def _write(self, ticket: ImportTicket, keys: Sequence[bytes], targets: Sequence[torch.Tensor]) -> int:
        """Read blocks straight into the pool and publish those that are intact."""
        found = 0
        try:
            found = await asyncio.to_thread(self.store.read_run, keys, targets)
        finally:
            taken = await self._runtime.on_engine(lambda engine: engine.adopt_write_end(ticket, found))
        return taken

    def _written(self, task: asyncio.Future[int]) -> None:
        self._writing.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.info("a restore came to nothing: %s", task.exception())

    async def settle(self, timeout_s: float) -> None:
        """Wait for the threads that write into the pool; before the engine stops."""
        if self._writing:
            await asyncio.wait(self._writing, timeout=timeout_s)

    def stage(self, keys: Sequence[bytes]) -> tuple[KVPool, int] | None:
        """A pool of its own with the leading blocks of ``keys`` that are held, for sending them; None without any."""
        wanted = keys[: len(self.store.held_run(keys))]
        if not wanted:
            return None
        pool = KVPool(self._runtime.engine.layout, len(wanted))
        blocks = list(torch.empty(len(wanted), self.store.block_bytes, dtype=torch.uint8).unbind(0))
        found = self.store.read_run(wanted, blocks)
        for index in range(found):
            pool.memory.copy_group_in(index, blocks[index])
        return (pool, found) if found else None

    def close(self) -> None:
        """End the threads; the file keeps its blocks."""
        self.store.close()


def _begin(
    engine: Engine, request: Request, blocks: int, worker: Literal["local", "prefill"]
) -> tuple[ImportTicket, list[torch.Tensor] | None]:
    """Room for a request's first blocks, and the memory of those that are missing if it can be written directly."""
    ticket = engine.adopt_prefix_begin(request, blocks, worker=worker)
    return ticket, engine.adopt_write_begin(ticket)


def _end(engine: Engine, ticket: ImportTicket, targets: list[torch.Tensor] | None, blocks: int) -> None:
    if targets is None:
        engine.abort_import(ticket)
    else:
        engine.adopt_write_end(ticket, blocks)
