"""One worker: engine loop, arena, data-plane server, registration, announcements. The role rooms add their jobs."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import secrets
import socket
import time
from typing import TYPE_CHECKING, TypeVar

import torch
from grpc import aio

from prismserve.core.cores import share_of, visible_cores
from prismserve.core.errors import (
    ConfigurationError,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
)
from prismserve.core.types import Tier, TokenOutput, WorkerInfo, WorkerState, WorkerStats
from prismserve.engine.engine import Engine
from prismserve.engine.loop import EngineLoop
from prismserve.kernels.dispatch import set_native
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.hub import TransportHub
from prismserve.kv_transfer.index.connect import open_index
from prismserve.kv_transfer.index.lease import WorkerLease
from prismserve.kv_transfer.receiver import Receiver
from prismserve.models.loader import load_model
from prismserve.models.processing import Processor
from prismserve.models.source import resolve_model
from prismserve.protocol import convert
from prismserve.protocol import worker_pb2 as pb
from prismserve.protocol.channel import SERVER_OPTIONS, ClusterSecretInterceptor
from prismserve.protocol.worker_pb2_grpc import add_WorkerServicer_to_server
from prismserve.worker_runtime.exchange import Exchange, Fetched
from prismserve.worker_runtime.explaining import Explainer
from prismserve.worker_runtime.local import LocalJobs
from prismserve.worker_runtime.memory_pool import MemoryPool
from prismserve.worker_runtime.peers import PeerDirectory
from prismserve.worker_runtime.service import WorkerService
from prismserve.worker_runtime.sessions import RequestRef, SessionTable
from prismserve.worker_runtime.tiering import Tiering
from prismserve.worker_runtime.warmup import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prismserve.core.types import Request
    from prismserve.engine.constraints import Matcher
    from prismserve.engine.prefix_cache import CacheEvents
    from prismserve.kv_transfer.index.base import KVIndex
    from prismserve.models.base import VisionLanguageModel
    from prismserve.worker_runtime.config import WorkerConfig
    from prismserve.worker_runtime.jobs import JobHandler, LandingHandler

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENGINE_CALL_TIMEOUT_S = 30.0


class WorkerRuntime:
    """A worker process without its actor.

    Life: construct, ``add_handler`` and ``landing`` by the role room between :meth:`load` and :meth:`serve`,
    ``stop``. All methods run on one event loop, except the engine's callbacks, which hop onto it.

    Args:
        config: what the cluster tells this worker.
        progress: called with (stage, done, total) while the model loads and warms up, from any thread.
    """

    engine: Engine
    engine_loop: EngineLoop
    hub: TransportHub
    receiver: Receiver
    index: KVIndex
    peers: PeerDirectory
    exchange: Exchange
    explainer: Explainer
    memory_pool: MemoryPool
    tiering: Tiering
    model: VisionLanguageModel

    def __init__(self, config: WorkerConfig, progress: Callable[[str, int, int], None]) -> None:
        self.config = config
        self.sessions = SessionTable()
        self.handlers: list[JobHandler] = []
        self.landing: LandingHandler | None = None
        self._progress = progress
        self._by_job: dict[int, JobHandler] = {}
        self.fetched: dict[RequestRef, Fetched] = {}
        self._taps: dict[RequestRef, Callable[[TokenOutput], None]] = {}
        self.lease: WorkerLease | None = None
        self._held: dict[bytes, None] = {}
        self._broken = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._server: aio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def info(self) -> WorkerInfo:
        """This worker's registration: current epoch and state."""
        if self.lease is None:
            message = "the worker has not registered yet"
            raise EngineError(message)
        return self.lease.info

    # ---- life --------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load the model and build the engine; ModelLoadError or ConfigurationError say why not."""
        config = self.config
        self._loop = asyncio.get_running_loop()
        # Native kernels take their number from here, and share PyTorch's pool.
        torch.set_num_threads(config.threads or share_of(visible_cores(), config.node_workers))
        set_native(on=config.engine.native_kernels)
        self.engine = await asyncio.to_thread(self._build_engine)
        self.tiering = await asyncio.to_thread(Tiering, self, config.tiers, self._on_tier)
        self.engine.image_cache.on_change = self._on_image
        self.engine_loop = EngineLoop(self.engine, self._on_outputs, self._on_cache_events)
        self.engine_loop.start()

    def _build_engine(self) -> Engine:
        config = self.config
        directory = resolve_model(config.model_directory)
        processor = Processor.from_directory(directory)
        self.model = load_model(
            directory,
            dtype=config.dtype,
            device=config.device,
            progress=lambda done, total: self._progress("weights", done, total),
        )
        engine = Engine(self.model, processor, config.engine)
        warm_up(engine, processor, self._progress)
        return engine

    async def serve(self) -> None:
        """Open the data plane and register; from here on routers find the worker."""
        config = self.config
        self.index = await open_index(config.index_url, config.cluster_id, config.index)
        worker_id = f"{config.role.value}-{secrets.token_hex(4)}"
        server = aio.server(
            interceptors=[ClusterSecretInterceptor(config.cluster_secret)], options=list(SERVER_OPTIONS)
        )
        add_WorkerServicer_to_server(WorkerService(self), server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port(f"{config.host}:0")
        if port == 0:
            message = f"the data plane cannot listen on {config.host}: set the worker's host to an address of this node"
            raise ConfigurationError(message, field="host")
        arena = Arena(config.transfer)
        self.hub = TransportHub(worker_id, arena, config.transfer.model_copy(update={"host": config.host}))
        self.receiver = Receiver(self.hub, self.engine.layout)
        info = WorkerInfo(
            worker_id=worker_id,
            role=config.role,
            epoch=0,
            pid=os.getpid(),
            node=socket.gethostname(),
            control_address=f"{config.host}:{port}",
            model_fingerprint=self.model.fingerprint,
            layout=self.engine.layout,
            transports=self.hub.transports,
            endpoint=self.hub.endpoint(),
            state=WorkerState.STARTING,
        )
        self.lease = WorkerLease(self.index, info, self._held_keys, config.index)
        await self.lease.start()
        self.peers = PeerDirectory(self.index, config.cluster_secret)
        self.exchange = Exchange(self)
        self.explainer = Explainer(self)
        self.memory_pool = MemoryPool(self)
        self.add_handler(pb.JOB_LOCAL, LocalJobs(self))
        await server.start()
        self._server = server
        self.lease.set_state(WorkerState.READY)
        self._tasks = [
            asyncio.create_task(self._report_stats(), name="stats"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)
        logger.info("worker %s epoch %d ready: %s", worker_id, self.info.epoch, ", ".join(info.transports))

    async def drain(self) -> None:
        """Tell the cluster to send nothing new, and wait for what runs, at most ``drain_timeout_s``."""
        if self.lease is not None:
            self.lease.set_state(WorkerState.DRAINING)
        deadline = time.monotonic() + self.config.drain_timeout_s
        # An event would be kept on the hot path for this alone.
        while self.sessions.requests and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Leave the cluster and release everything; safe after a failed start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.lease is not None:
            await self.lease.stop()
        self.sessions.close_all()
        if self._server is not None:
            await self._server.stop(grace=1.0)
        if hasattr(self, "peers"):
            await self.peers.close()
        if hasattr(self, "tiering"):
            await self.tiering.settle(5.0)
        if hasattr(self, "engine_loop"):
            await asyncio.to_thread(self.engine_loop.stop, 5.0)
            self.engine.constraints.close()
        if hasattr(self, "tiering"):
            await asyncio.to_thread(self.tiering.close)
        if hasattr(self, "receiver"):
            await asyncio.to_thread(self.receiver.close)
        if hasattr(self, "hub"):
            await asyncio.to_thread(self.hub.close)
            self.hub.arena.close()
        if hasattr(self, "index"):
            await self.index.close()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._broken = f"{task.get_name()} ended: {task.exception()!r}"
            logger.error("worker %s: %s", self.info.worker_id, self._broken)

    def check(self) -> None:
        """Raise EngineError if the worker cannot serve any more."""
        if self._broken:
            raise EngineError(self._broken)
        if not self.engine_loop.alive:
            message = f"worker {self.info.worker_id}: the engine loop has ended"
            raise EngineError(message)

    # ---- jobs --------------------------------------------------------------------------------------------------

    def add_handler(self, job: int, handler: JobHandler) -> None:
        """Let ``handler`` carry out jobs of this kind (a ``pb.Job``)."""
        self._by_job[job] = handler
        if handler not in self.handlers:
            self.handlers.append(handler)

    def handler(self, job: int) -> JobHandler:
        """The handler of a job; ConfigurationError if this role has none."""
        try:
            return self._by_job[job]
        except KeyError:
            message = f"worker {self.info.worker_id} ({self.config.role.value}) does not do {pb.Job.Name(job)}"
            raise ConfigurationError(message) from None

    def tap(self, ref: RequestRef, receive: Callable[[TokenOutput], None]) -> None:
        """Hand this request's outputs to ``receive`` instead of its session, until :meth:`untap`."""
        self._taps[ref] = receive

    def untap(self, ref: RequestRef) -> None:
        """End a tap."""
        self._taps.pop(ref, None)

    async def on_engine(self, work: Callable[[Engine], T], timeout_s: float = ENGINE_CALL_TIMEOUT_S) -> T:
        """Run ``work`` between two engine steps."""
        future = asyncio.wrap_future(self.engine_loop.call(work))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            message = f"the engine did not answer within {timeout_s:g} s"
            raise DeadlineExceededError(message) from None

    async def matcher(self, request: Request) -> Matcher | None:
        """Compile the request's constraint, off the engine's thread and this loop; None if it has none.

        Raises:
            InvalidRequestError: it is malformed, cannot be satisfied, or is too complex.
            OverloadedError: too many constraints wait to be compiled.
        """
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        timeout_s = self.config.engine.constraint_timeout_s
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self.engine.constraints.compile(constraint)), timeout_s)
        except TimeoutError:
            message = f"the constraint on the answer took longer than {timeout_s:g} s to compile; simplify it"
            raise InvalidRequestError(message, field="constraint", request_id=request.request_id) from None

    # ---- engine callbacks (engine thread) ----------------------------------------------------------------------

    def _on_outputs(self, outputs: list[TokenOutput]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _on_cache_events(self, events: CacheEvents) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._collect, events)

    def _dispatch(self, outputs: list[TokenOutput]) -> None:
        passed: list[TokenOutput] = []
        for output in outputs:
            receive = self._taps.get((output.request_id, output.attempt))
            if receive is not None:
                receive(output)
                continue
            passed.append(self._completed(output))
        if passed:
            self.sessions.deliver(passed)

    def _completed(self, output: TokenOutput) -> TokenOutput:
        """An output of a local job with what its report lacks: this worker's id, and what was fetched for it."""
        report = output.report
        if report is None or report.worker_id:
            if output.finish_reason is not None:
                self.fetched.pop((output.request_id, output.attempt), None)
            return output
        report = dataclasses.replace(report, worker_id=self.info.worker_id)
        fetched = self.fetched.pop((output.request_id, output.attempt), None)
        return dataclasses.replace(output, report=report if fetched is None else fetched.into(report))

    def _on_image(self, key: bytes, held: bool) -> None:  # noqa: FBT001 - the callback's shape
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._image_changed, key, held)

    def _image_changed(self, key: bytes, held: bool) -> None:  # noqa: FBT001 - as above
        if held:
            self.tiering.offer_image(key)
        self._collect_keys([key] if held else [], [] if held else [key])

    def _held_keys(self) -> dict[Tier, list[bytes]]:
        return {Tier.DEVICE: list(self._held), **self.tiering.held()}

    def _on_tier(self, tier: Tier, gained: Sequence[bytes], lost: Sequence[bytes]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tier_changed, tier, gained, lost)

    def _tier_changed(self, tier: Tier, gained: Sequence[bytes], lost: Sequence[bytes]) -> None:
        if self.lease is not None:
            self.lease.changed(gained, lost, tier)

    def _collect(self, events: CacheEvents) -> None:
        self.tiering.store.offer(events.added)
        self._collect_keys(events.added, events.removed)

    def _collect_keys(self, added: Sequence[bytes], removed: Sequence[bytes]) -> None:
        for key in added:
            self._held[key] = None
        for key in removed:
            self._held.pop(key, None)
        if self.lease is not None:
            self.lease.changed(added, removed)

    # ---- background --------------------------------------------------------------------------------------------

    async def _report_stats(self) -> None:
        while True:
            await asyncio.sleep(self.config.stats_interval_s)
            self.sessions.broadcast(self.stats_message())

    def stats(self) -> WorkerStats:
        """Engine and transfer counters together."""
        counters, tier_rates = self.exchange.counters, self.tiering.rates()
        return dataclasses.replace(
            self.engine.stats(),
            worker_id=self.info.worker_id,
            threads=torch.get_num_threads(),
            transfers=counters.transfers,
            transfer_bytes=counters.sent_bytes,
            transfer_raw_bytes=counters.raw_bytes,
            transfer_seconds=counters.seconds,
            transfer_failures=counters.failures,
            link_bytes_per_s=tuple(self.hub.rates().items()),
            tier_host_bytes_per_s=tier_rates.get("host", 0.0),
            tier_disk_bytes_per_s=tier_rates.get("disk", 0.0),
            **self.tiering.stats(),
        )

    def stats_message(self) -> pb.WorkerMessage:
        """The stats as routers get them."""
        return pb.WorkerMessage(stats=convert.stats_to_proto(self.stats(), self.info.state.value))
