"""A worker's tiers at work: published blocks sink, and the prefix of a request comes back where that is cheaper."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from typing import TYPE_CHECKING, Literal

import torch

from prismserve.core.errors import PrismServeError
from prismserve.core.hashing import digest
from prismserve.core.prompt import block_keys, elements
from prismserve.core.types import MediaSegment, Tier
from prismserve.engine.encoding import image_label
from prismserve.engine.pool import KVPool
from prismserve.kv_transfer.costs import FIRST_GUESS_TIER_BYTES_PER_S
from prismserve.kv_transfer.latency import CurveFit
from prismserve.kv_transfer.tiers.calibration import Calibration
from prismserve.kv_transfer.tiers.eviction import Label
from prismserve.kv_transfer.tiers.restore import FIXED_S, SAFE_SHARE, Restore, decide
from prismserve.kv_transfer.tiers.store import TierStore
from prismserve.worker_runtime.image_shelf import ImageShelf, owner_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prismserve.core.types import Request
    from prismserve.engine.engine import Engine, ImportTicket
    from prismserve.engine.image_cache import ImageLabel
    from prismserve.kv_transfer.tiers.config import TierConfig
    from prismserve.worker_runtime.jobs import Submission
    from prismserve.worker_runtime.runtime import WorkerRuntime

logger = logging.getLogger(__name__)

_BY_NAME = {"host": Tier.HOST, "disk": Tier.DISK}


class EngineBlocks:
    """The engine as the tiers see it; see :class:`prismserve.kv_transfer.tiers.store.BlockSource`."""

    def __init__(self, engine: Engine, shelf: ImageShelf) -> None:
        self._engine = engine
        self._shelf = shelf

    def copy_block(self, key: bytes, target: torch.Tensor) -> Label | None:
        """Copy a cached block, or one of an image, and label it with its tenant."""
        owner = self._engine.copy_block(key, target)
        if owner is None:
            return self._shelf.copy_part(key, target)
        return Label(owner_bytes(owner.name), owner.share)


class Tiering:
    """The tiers of one worker.

    Args:
        runtime: the worker; its engine is built, its index may not be there yet.
        config: sizes and limits.
        on_change: called with (tier, gained, lost), on any thread.

    Attributes:
        store: the tiers themselves.
        restored_images: images that did not have to be encoded thanks to the tiers.
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
        self._on_change = on_change
        self._shelf = ImageShelf(engine.image_cache, engine.group_bytes)
        self.store = TierStore(
            config,
            engine.group_bytes,
            identity,
            EngineBlocks(engine, self._shelf),
            lambda name, gained, lost: on_change(_BY_NAME[name], gained, lost),
        )
        self.restored_images = 0
        self.restored_tokens = 0
        self.misses = 0
        self._writing: set[asyncio.Future[int]] = set()
        self._prefill = CurveFit()
        self._prefill_errors = Calibration()
        self._restore_errors = Calibration()

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
            "tier_restored_images": self.restored_images,
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
        size, keys = runtime.engine.layout.block_tokens, self._keys(request, worker)
        # Asked without waiting for the engine: a request that finds nothing here must not wait for a step to end.
        plan = self._plan(request, keys, runtime.engine.held_blocks(keys))
        if not plan.worth_it:
            if plan.reason == "too_close":
                self._restore_errors.forget()
            return 0
        started_s = time.perf_counter()
        try:
            taken = await self._bring_back(request, worker, keys, plan.first, plan.blocks)
        except (PrismServeError, TimeoutError) as error:
            self.misses += 1
            self._restore_errors.add(plan.restore_s, time.perf_counter() - started_s)
            logger.info("request %s: nothing was restored: %s", request.request_id, str(error) or "it took too long")
            return 0
        if taken == plan.blocks:
            self._restore_errors.add(plan.restore_s, time.perf_counter() - started_s)
        self.restored_tokens += taken * size
        self.misses += taken == 0
        return taken * size

    def offer_image(self, key: bytes) -> None:
        """An image is held ready now; it is copied in the background."""
        if self._config.images and self.store.tiers:
            self.store.offer(self._shelf.parts(key))

    async def restore_images(self, submission: Submission, worker: Literal["local", "prefill"]) -> None:
        """Bring back the embeddings a request needs and the image cache lacks, where encoding takes longer."""
        request, engine = submission.request, self._runtime.engine
        if not self._config.images or not self.store.tiers:
            return
        ends = itertools.accumulate(segment.tokens for segment in request.prompt.segments)
        lacking = [
            (segment, end)
            for segment, end in zip(request.prompt.segments, ends, strict=True)
            if isinstance(segment, MediaSegment)
            and segment.key not in engine.image_cache
            and self.store.tier_of(segment.key) is not None
        ]
        held_tokens = self._held_tokens(request, worker) if lacking else 0
        decoder = self._runtime.model.decoder.config
        token_bytes = decoder.hidden_size * (1 + decoder.deepstack_layers) * self._runtime.model.dtype.itemsize
        for segment, end in lacking:
            if end > held_tokens:
                encode_s = engine.encode_token_s * segment.raw_tokens or float("inf")
                label = image_label(request, segment.media_index)
                nbytes = segment.tokens * token_bytes
                self.restored_images += await self.restore_image(segment.key, label, encode_s, nbytes)

    async def restore_image(
        self, key: bytes, label: ImageLabel, worth_s: float = float("inf"), nbytes: int = 0
    ) -> bool:
        """Put an image that is in the tiers into the image cache; whether it was there and could be read in time.

        Args:
            key: of the image.
            label: whose it is.
            worth_s: how long reading it may be predicted to take.
            nbytes: of its embeddings, for that prediction.
        """
        tier = self.store.tier_of(key)
        if tier is None:
            return False
        rate = tier.counters.read_bytes_per_s or FIRST_GUESS_TIER_BYTES_PER_S[tier.name]
        if FIXED_S + self._shelf.blocks(nbytes) * self.store.block_bytes / rate >= worth_s:
            return False
        reading = asyncio.to_thread(self._shelf.load, key, self.store)
        try:
            tokens = await asyncio.wait_for(reading, self._config.restore_timeout_s)
        except TimeoutError:
            return False
        if tokens is None:
            return False
        embeds = tokens.embeds.to(self._runtime.model.device)
        self._runtime.engine.image_cache.put(key, dataclasses.replace(tokens, embeds=embeds), label)
        return True

    def _held_tokens(self, request: Request, worker: Literal["local", "prefill"]) -> int:
        """Leading prompt tokens that are on the device now; a hint."""
        keys = self._keys(request, worker)
        return self._runtime.engine.held_blocks(keys) * self._runtime.engine.layout.block_tokens

    def _plan(self, request: Request, keys: Sequence[bytes], first: int) -> Restore:
        self._learn()
        size = self._runtime.engine.layout.block_tokens
        run = self.store.held_run(keys[first:])
        return decide(
            first=first,
            tiers=[tier.name for tier in run],
            block_bytes=self.store.block_bytes,
            bytes_per_s=self.rates(),
            saved_s=self._saved_s(request, first * size, len(run) * size),
            blocks_min=self._config.restore_blocks_min,
            restore_error=self._restore_errors.quantile(SAFE_SHARE),
            compute_error=self._prefill_errors.quantile(1.0 - SAFE_SHARE),
        )

    def _saved_s(self, request: Request, cached: int, restored: int) -> float:
        """Time of prefill that ``restored`` tokens behind ``cached`` ones spare; infinite before anything was prefilled.

        What a step costs whatever it computes is not spared, since the last token always is.
        """
        if not self._prefill.samples:
            return float("inf")
        curve, tokens = self._prefill.curve(), request.prompt.tokens + len(request.resume_token_ids)
        rest = tokens - cached - restored
        return curve.seconds(cached, tokens - cached) - curve.seconds(cached + restored, rest)

    def _learn(self) -> None:
        """Take in the prefills since the last time, and how far the curve was off for each of them."""
        for cached, tokens, seconds in self._runtime.engine.take_prefills():
            if self._prefill.samples:
                self._prefill_errors.add(self._prefill.curve().seconds(cached, tokens), seconds)
            self._prefill.observe(cached, tokens, seconds)

    async def bring_back(self, request: Request, worker: Literal["local", "prefill"]) -> int:
        """Restore what the tiers have of a prompt, whatever that takes; tokens brought back.

        Raises:
            OverloadedError: too few blocks now.
            TimeoutError: it took longer than ``restore_timeout_s``.
        """
        keys = self._keys(request, worker)
        first = self._runtime.engine.held_blocks(keys)
        blocks = len(self.store.held_run(keys[first:]))
        if not blocks:
            return 0
        taken = await self._bring_back(request, worker, keys, first, blocks)
        self.restored_tokens += taken * self._runtime.engine.layout.block_tokens
        return taken * self._runtime.engine.layout.block_tokens

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget blocks in every tier, and say so."""
        for tier in self.store.tiers:
            held = [key for key in keys if key in tier]
            for key in held:
                tier.drop(key)
            if held:
                self._on_change(_BY_NAME[tier.name], (), held)

    def _keys(self, request: Request, worker: Literal["local", "prefill"]) -> list[bytes]:
        """Keys of the blocks a prompt may find; the one that holds its last token is always computed."""
        size = self._runtime.engine.layout.block_tokens
        namespace = request.namespace if worker == "prefill" else request.wire_namespace
        slots = elements(request.prompt, request.resume_token_ids)
        return list(block_keys(namespace, slots, size))[: max(0, len(slots) - 1) // size]

    async def _bring_back(
        self,
        request: Request,
        worker: Literal["local", "prefill"],
        keys: Sequence[bytes],
        first: int,
        blocks: int,
    ) -> int:
        size = self._runtime.engine.layout.block_tokens
        ticket, targets = await self._runtime.on_engine(lambda engine: _begin(engine, request, first + blocks, worker))
        held = ticket.cached_tokens // size
        wanted = keys[held : len(ticket.table)]
        if held < first or not wanted:
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
