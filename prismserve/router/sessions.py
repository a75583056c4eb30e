"""The router's side of the data plane: one stream to every worker, its outputs sorted into mailboxes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Final

import grpc

from prismserve.core.errors import OverloadedError, TransferError, WorkerUnavailableError
from prismserve.core.types import WorkerState, WorkerStats
from prismserve.protocol import worker_pb2 as pb
from prismserve.protocol.channel import CHANNEL_OPTIONS, secret_metadata
from prismserve.protocol.convert import stats_from_proto, token_output_from_proto
from prismserve.protocol.worker_pb2_grpc import WorkerStub
from prismserve.router.mailbox import WorkerLost, WorkerOutput

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismserve.core.types import WorkerInfo
    from prismserve.router.config import RouterConfig
    from prismserve.router.mailbox import Mailbox

logger = logging.getLogger(__name__)

_Key = tuple[str, int]


class _SessionLostError(Exception):
    """Why a session ended; stays inside this module."""


# Writing to a call that has ended raises InvalidStateError.
_SESSION_ENDS: Final = (
    _SessionLostError,
    grpc.aio.AioRpcError,
    TransferError,
    TimeoutError,
    OSError,
    asyncio.InvalidStateError,
)


class WorkerSession:
    """One worker: connects, reconnects with backoff, sends, receives. Owned by :class:`WorkerPool`.

    Attributes:
        info: the registry's latest record; a larger epoch in it ends the running stream.
        stats: the latest record the worker sent.
        connected: whether a stream with the right epoch is up.
    """

    def __init__(
        self, router_id: str, info: WorkerInfo, config: RouterConfig, on_change: Callable[[], None], secret: str = ""
    ) -> None:
        self.info = info
        self._metadata = secret_metadata(secret)
        self.stats = WorkerStats(worker_id=info.worker_id)
        self.connected = False
        self.registered = True
        self._state = info.state
        self._router_id = router_id
        self._config = config
        self._on_change = on_change
        self._boxes: dict[_Key, Mailbox] = {}
        self._outbox: asyncio.Queue[pb.RouterMessage] = asyncio.Queue()
        self._heard_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Attempts of this router at this worker."""
        return len(self._boxes)

    @property
    def state(self) -> WorkerState:
        """What the worker last said of itself; LOST without a stream."""
        return self._state if self.connected else WorkerState.LOST

    @property
    def current(self) -> WorkerInfo:
        """The registry's record with the state as known here."""
        return dataclasses.replace(self.info, state=self.state)

    @property
    def silent_s(self) -> float:
        """Seconds since the worker was last heard."""
        return time.monotonic() - self._heard_at

    def start(self) -> None:
        """Begin connecting."""
        self._task = asyncio.create_task(self._run(), name=f"session-{self.info.worker_id}")

    async def stop(self) -> None:
        """End the stream and the task; mailboxes are told."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._lost()

    def update(self, info: WorkerInfo) -> None:
        """Take a newer record; another epoch or address ends the stream, which is then opened anew."""
        moved = (info.epoch, info.control_address) != (self.info.epoch, self.info.control_address)
        # The registry and the worker's own statistics both tell the state: the latest change wins.
        if info.state is not self.info.state and info.state is not self._state:
            self._state = info.state
            self._on_change()
        self.info = info
        self.registered = True
        if moved:
            self._ended.set()

    def drop(self) -> None:
        """End the running stream; a reconnect is tried."""
        self._ended.set()

    def attach(self, box: Mailbox) -> None:
        """Deliver events of an attempt to ``box`` from now on; WorkerUnavailableError without a stream."""
        if not self.connected:
            message = "a chosen worker is not connected"
            raise WorkerUnavailableError(message, request_id=box.request_id)
        self._boxes[(box.request_id, box.attempt)] = box

    def detach(self, box: Mailbox) -> bool:
        """Stop delivering; False if the attempt was unknown, so there is nothing to cancel."""
        return self._boxes.pop((box.request_id, box.attempt), None) is not None

    def submit(self, message: pb.Submit) -> None:
        """Queue a submission; OverloadedError when ``max_session_queue`` messages wait."""
        if self._outbox.qsize() >= self._config.max_session_queue:
            text = "the session to a worker is congested; try again shortly"
            raise OverloadedError(text, retry_after_s=self._config.retry_after_s)
        self._outbox.put_nowait(pb.RouterMessage(submit=message))

    def cancel(self, box: Mailbox) -> None:
        """Stop delivering to ``box``, and tell the worker if it was; a lost stream cancels by itself.

        Never refused, however long the queue: there is one cancellation for every attempt that was submitted, so it
        is bounded all the same, and a worker that is not told computes for nobody.
        """
        if self.detach(box) and self.connected:
            message = pb.Cancel(request_id=box.request_id, attempt=box.attempt)
            self._outbox.put_nowait(pb.RouterMessage(cancel=message))

    async def _run(self) -> None:
        backoff_s = self._config.reconnect_backoff_s
        while True:
            self._ended.clear()
            epoch = self.info.epoch
            try:
                await self._stream()
            except _SESSION_ENDS as error:
                logger.warning("session to worker %s ended: %s", self.info.worker_id, _describe(error))
            was_connected = self.connected
            self._lost()
            if was_connected or self.info.epoch != epoch:
                backoff_s = self._config.reconnect_backoff_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self._ended.wait()
            backoff_s = min(backoff_s * 2, self._config.reconnect_backoff_max_s)

    async def _stream(self) -> None:
        # Its own connection: a session must not hang on another one's broken connection.
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        info = self.info
        async with grpc.aio.insecure_channel(info.control_address, options=options) as channel:
            call = WorkerStub(channel).Session(metadata=self._metadata)  # type: ignore[no-untyped-call]
            try:
                async with asyncio.timeout(self._config.connect_timeout_s):
                    await call.write(pb.RouterMessage(hello=pb.Hello(router_id=self._router_id)))
                    welcome = await call.read()
                self._check_welcome(info, welcome)
                self._connected()
                await self._pump(call)
            finally:
                call.cancel()

    async def _pump(self, call: grpc.aio.StreamStreamCall[pb.RouterMessage, pb.WorkerMessage]) -> None:
        tasks = [
            asyncio.create_task(self._write(call)),
            asyncio.create_task(self._read(call)),
            asyncio.create_task(self._ended.wait()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        reason = "the worker was registered anew or fell silent"
        raise _SessionLostError(reason)

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.RouterMessage, pb.WorkerMessage]) -> None:
        while True:
            await call.write(await self._outbox.get())

    async def _read(self, call: grpc.aio.StreamStreamCall[pb.RouterMessage, pb.WorkerMessage]) -> None:
        while True:
            async with asyncio.timeout(self._config.worker_silence_s):
                message = await call.read()
            if not isinstance(message, pb.WorkerMessage):
                reason = "the worker closed the stream"
                raise _SessionLostError(reason)
            self._heard_at = time.monotonic()
            match message.WhichOneof("body"):
                case "outputs":
                    self._deliver(message.outputs)
                case "stats":
                    self._take_stats(message.stats)
                case _:
                    reason = "the worker sent an unexpected message"
                    raise _SessionLostError(reason)

    def _deliver(self, outputs: pb.StepOutputs) -> None:
        for item in outputs.outputs:
            box = self._boxes.get((item.request_id, item.attempt))
            # No box: the attempt ended here (cancelled, migrated) before the worker heard of it.
            if box is not None and not box.put(WorkerOutput(self.info.worker_id, token_output_from_proto(item))):
                reason = "the worker sent more tokens than were asked for"
                raise _SessionLostError(reason)

    def _take_stats(self, stats: pb.Stats) -> None:
        self.stats = stats_from_proto(self.info.worker_id, stats)
        if stats.state and stats.state != self._state:
            if stats.state not in tuple(WorkerState):
                reason = "the worker reported an unknown state"
                raise _SessionLostError(reason)
            self._state = WorkerState(stats.state)
            self._on_change()

    def _check_welcome(self, info: WorkerInfo, message: object) -> None:
        if not isinstance(message, pb.WorkerMessage) or message.WhichOneof("body") != "welcome":
            reason = "the worker did not answer the greeting"
            raise _SessionLostError(reason)
        welcome = message.welcome
        if (welcome.worker_id, welcome.epoch) != (info.worker_id, info.epoch):
            reason = f"expected epoch {info.epoch} of {info.worker_id}, met {welcome.epoch} of {welcome.worker_id}"
            raise _SessionLostError(reason)

    def _connected(self) -> None:
        self._state = self.info.state
        self._heard_at = time.monotonic()
        self.connected = True
        self._on_change()

    def _lost(self) -> None:
        was_connected, self.connected = self.connected, False
        boxes, self._boxes = self._boxes, {}
        while not self._outbox.empty():
            self._outbox.get_nowait()
        for box in boxes.values():
            box.put(WorkerLost(self.info.worker_id))
        if was_connected:
            self._on_change()


def _describe(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__


class WorkerPool:
    """Sessions to all registered workers of one model and layout.

    A worker that leaves the registry keeps its session while it is heard, because the registry may have lost its
    state; one that is neither registered nor heard is dropped.

    Args:
        router_id: how this router introduces itself.
        registry: the registered workers, read often, without I/O.
        accepts: whether a worker serves our model with our layout.
        config: timing and bounds.
        secret: the cluster secret that workers' data planes ask for.
    """

    def __init__(
        self,
        router_id: str,
        registry: Callable[[], list[WorkerInfo]],
        accepts: Callable[[WorkerInfo], bool],
        config: RouterConfig,
        secret: str = "",
    ) -> None:
        self._router_id = router_id
        self._secret = secret
        self._registry = registry
        self._accepts = accepts
        self._config = config
        self._sessions: dict[str, WorkerSession] = {}
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def sessions(self) -> list[WorkerSession]:
        """All sessions, by worker id."""
        return [self._sessions[name] for name in sorted(self._sessions)]

    def session(self, worker_id: str) -> WorkerSession:
        """The session to a worker; WorkerUnavailableError if there is none."""
        session = self._sessions.get(worker_id)
        if session is None:
            message = "a chosen worker has left the cluster"
            raise WorkerUnavailableError(message)
        return session

    def start(self) -> None:
        """Begin following the registry."""
        self._task = asyncio.create_task(self._follow(), name="worker-pool")

    async def stop(self) -> None:
        """End all sessions."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*(session.stop() for session in self._sessions.values()))
        self._sessions.clear()

    async def wait_change(self, timeout_s: float) -> None:
        """Return when a worker has connected, gone or changed state, or after ``timeout_s`` seconds."""
        event = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()

    def _notify(self) -> None:
        # A fresh event per change: whoever waits is woken once and never misses a later change.
        self._changed.set()
        self._changed = asyncio.Event()

    async def _follow(self) -> None:
        while True:
            await self.reconcile()
            await asyncio.sleep(self._config.reconcile_interval_s)

    async def reconcile(self) -> None:
        """Open sessions to new workers, close those to workers that are gone."""
        registered = {info.worker_id: info for info in self._registry() if self._accepts(info)}
        for worker_id, info in registered.items():
            known = self._sessions.get(worker_id)
            if known is not None:
                known.update(info)
                continue
            session = WorkerSession(self._router_id, info, self._config, self._notify, self._secret)
            self._sessions[worker_id] = session
            session.start()
        for worker_id in [name for name in self._sessions if name not in registered]:
            session = self._sessions[worker_id]
            session.registered = False
            if session.connected and session.silent_s < self._config.unregistered_silence_s:
                continue
            del self._sessions[worker_id]
            await session.stop()
            self._notify()
