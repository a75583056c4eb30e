"""A router without sockets of its own: everything behind the front doors, wired once."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import time
from typing import TYPE_CHECKING, Any

import prismserve
from prismserve.compression.presets_table import described
from prismserve.core.errors import DeadlineExceededError, PrismServeError, RequestCancelledError
from prismserve.core.types import MediaKind
from prismserve.kv_transfer.index.mirror import Mirror
from prismserve.models.token_bytes import TokenBytes
from prismserve.router.admission import Admission
from prismserve.router.choices import run_choices
from prismserve.router.explaining import ask_worker, choose_worker
from prismserve.router.fidelity.config import FidelityConfig
from prismserve.router.fidelity.guard import FidelityGuard, Surroundings
from prismserve.router.fidelity.judge import Judge
from prismserve.router.fidelity.metrics import FidelityMetrics
from prismserve.router.generation import Finished, Generator
from prismserve.router.media import MediaReader
from prismserve.router.metrics import RouterMetrics
from prismserve.router.overlays import document, overlay
from prismserve.router.placement import Placer
from prismserve.router.requests import RequestBuilder
from prismserve.router.sampling import choices_of
from prismserve.router.sessions import WorkerPool
from prismserve.router.status import pool_status, worker_status
from prismserve.router.tenants import Tenants

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from prismserve.core.types import WorkerInfo
    from prismserve.kv_transfer.index.base import KVIndex
    from prismserve.models.processing import Processor
    from prismserve.router.calls import Call
    from prismserve.router.config import RouterConfig
    from prismserve.router.generation import GenerationEvent
    from prismserve.router.requests import ModelFacts, Prepared

logger = logging.getLogger(__name__)


class RouterService:
    """Everything a front door needs.

    Args:
        processor: of the served model.
        facts: identity and limits of the served model.
        index: followed for workers and cache contents; closed by its owner, not here.
        config: limits, timing, placement weights.
        default_compression: preset or method name of requests that give none.
        router_id: unique name of this router.
        cluster_secret: what workers' data planes ask for.
        tenants: who may ask; None serves everyone as one tenant.
        fidelity: how much is replayed without compression, and what follows from it.
    """

    def __init__(  # noqa: PLR0913 - the one place where a router is put together
        self,
        processor: Processor,
        facts: ModelFacts,
        index: KVIndex,
        config: RouterConfig,
        *,
        default_compression: str = "off",
        router_id: str = "router-0",
        cluster_secret: str = "",
        tenants: Tenants | None = None,
        fidelity: FidelityConfig | None = None,
    ) -> None:
        self.config = config
        self.facts = facts
        self.processor = processor
        self.token_bytes = TokenBytes(processor.tokenizer)
        self.router_id = router_id
        self.tenants = tenants or Tenants()
        self.admission = Admission(config)
        self.mirror = Mirror()
        self.pool = WorkerPool(router_id, self.mirror.workers, self._serves_us, config, cluster_secret)
        self.metrics = RouterMetrics(facts.name, lambda: self.pool.sessions, lambda: self.admission.running)
        self._secret = cluster_secret
        self._drawing = asyncio.Semaphore(1)
        self._index = index
        self._media = MediaReader(config)
        fidelity = fidelity or FidelityConfig()
        judge = Judge(fidelity, time.monotonic)
        self._builder = RequestBuilder(processor, facts, config, self._media, default_compression, judge.in_force)
        self._placer = Placer(self.pool, self.mirror, config, facts)
        self._generator = Generator(processor, self.pool, self._placer, self.metrics, config, facts.layout.token_bytes)
        # Replays are no traffic: what they do is not counted as such.
        unheard = RouterMetrics(facts.name, list, lambda: 0)
        replays = Generator(processor, self.pool, self._placer, unheard, config, facts.layout.token_bytes)
        self.fidelity = FidelityGuard(
            fidelity,
            judge,
            FidelityMetrics(self.metrics.registry, facts.name, fidelity.label_sets_max),
            Surroundings(
                build=self._builder.again,
                generate=lambda again, timeout_s: replays.run(again, arrived_at=time.monotonic(), timeout_s=timeout_s),
                idle=self._idle,
                crowded=self._crowded,
                stands_for=described(processor.family_name),
            ),
            draw=random.SystemRandom().random,
        )
        self._stopping = asyncio.Event()
        self._follow: asyncio.Task[None] | None = None
        self._started_at = time.monotonic()
        self.created = int(time.time())

    async def start(self) -> None:
        """Follow the index and connect to workers as they register."""
        self._follow = asyncio.create_task(self._index.follow(self.mirror, self._stopping), name="index-follow")
        self.pool.start()
        self.fidelity.start()

    async def stop(self) -> None:
        """End sessions and threads; requests still running fail as unavailable."""
        self._stopping.set()
        await self.fidelity.stop()
        await self.pool.stop()
        if self._follow is not None:
            done, _ = await asyncio.wait({self._follow}, timeout=self.config.stop_timeout_s)
            if not done:
                self._follow.cancel()
            await asyncio.gather(self._follow, return_exceptions=True)
        self._media.close()
        self._builder.close()

    @property
    def ready(self) -> bool:
        """Whether a request could be served now."""
        return not self._stopping.is_set() and self._placer.ready()

    async def wait_ready(self, timeout_s: float) -> bool:
        """Wait until :attr:`ready`; False when that took longer than ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not self.ready:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            await self.pool.wait_change(min(left_s, 0.25))
        return True

    async def answer(self, call: Call, *, arrived_at: float) -> AsyncGenerator[GenerationEvent, None]:
        """Serve one call; closing the iterator cancels it everywhere.

        Args:
            call: what was asked.
            arrived_at: ``time.monotonic()`` on arrival.

        Raises:
            PrismServeError: see :meth:`Generator.run`, :func:`run_choices` and :meth:`RequestBuilder.build`.
        """
        ended = False
        self.fidelity.arrived()
        try:
            choices = choices_of(call.options, self.config)
            with self.admission.slot(call.tenant, choices):
                prepared = await self._builder.build(call)
                samples = sum(len(item.data) for item in prepared.request.media if item.kind is MediaKind.VIDEO)
                with self.admission.videos(samples):
                    run = functools.partial(self._run, call, arrived_at)
                    stream = run(prepared, None) if choices == 1 else run_choices(run, prepared, choices)
                    async with contextlib.aclosing(stream) as events:
                        async for event in events:
                            ended = isinstance(event, Finished) and event.usage is not None
                            if ended:
                                # Before it is handed on: a caller who has the last event asks for no more.
                                self.fidelity.finished(call, prepared)
                            yield event
        except PrismServeError as error:
            ended = True
            self.metrics.failed(type(error).__name__)
            raise
        finally:
            if not ended:
                self.metrics.failed(RequestCancelledError.__name__)

    def _run(
        self, call: Call, arrived_at: float, prepared: Prepared, near: str | None
    ) -> AsyncGenerator[GenerationEvent, None]:
        return self._generator.run(prepared, arrived_at=arrived_at, timeout_s=call.timeout_s, near=near)

    async def explain(self, call: Call, *, drawn: bool) -> tuple[dict[str, Any], bytes]:
        """What compression would do to the visual tokens of a call.

        Args:
            call: what was asked; its sampling does not matter.
            drawn: whether a picture is wanted.

        Returns:
            Plain data for JSON, and a PNG file, empty if none was wanted.

        Raises:
            PrismServeError: see :func:`ask_worker`, :func:`choose_worker` and :meth:`RequestBuilder.build`.
        """
        limit_s = min(call.timeout_s or self.config.request_timeout_s, self.config.request_timeout_s)
        self.fidelity.arrived()
        try:
            with self.admission.slot(call.tenant):
                async with asyncio.timeout(limit_s):
                    prepared = await self._builder.build(call)
                    request = prepared.request
                    worker = choose_worker(self.pool.sessions)
                    explanation = await ask_worker(worker, request, self._secret, limit_s)
                    png = b""
                    if drawn:
                        async with self._drawing:
                            png = await asyncio.to_thread(overlay, request.media, explanation)
        except TimeoutError:
            message = "the request was not explained within its time limit"
            raise DeadlineExceededError(message) from None
        return document(request.compression, explanation, prepared.preset_asked), png

    def status(self) -> dict[str, Any]:
        """The status document: plain data for JSON."""
        sessions = self.pool.sessions
        return {
            "version": prismserve.__version__,
            "model": self.facts.name,
            "model_fingerprint": self.facts.fingerprint.hex(),
            "max_model_len": self.facts.max_model_len,
            "ready": self.ready,
            "router": {
                "id": self.router_id,
                "uptime_s": round(time.monotonic() - self._started_at, 3),
                "requests": self.admission.running,
                "requests_max": self.config.max_concurrent_requests,
                "index_synced": self.mirror.synced,
                "index_keys": len(self.mirror),
                "images_decoded": self._media.decoded_images,
                "images_remembered": self._media.remembered_images,
                "videos_decoded": self._media.decoded_videos,
                "videos_remembered": self._media.remembered_videos,
            },
            "fidelity": self.fidelity.status(),
            "pools": pool_status(sessions),
            "workers": [worker_status(session) for session in sessions],
        }

    def _idle(self) -> bool:
        """Whether nobody needs a worker, as far as is known here."""
        free = (s.in_flight == s.stats.running == s.stats.waiting == 0 for s in self.pool.sessions)
        return self.admission.running == 0 and all(free)

    def _crowded(self) -> bool:
        """Whether workers have more to do than one replay, because other routers send requests."""
        return any(s.stats.waiting > 1 or s.stats.running > 1 for s in self.pool.sessions)

    def _serves_us(self, info: WorkerInfo) -> bool:
        # During a rolling update two models or layouts may be registered; their KV must never meet.
        return info.model_fingerprint == self.facts.fingerprint and info.layout == self.facts.layout
