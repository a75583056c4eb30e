"""Other workers, as the cluster's registry lists them, and the channels to them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc import aio

from prismserve.core.errors import (
    DeadlineExceededError,
    IndexUnavailableError,
    PrismServeError,
    TransportError,
    WorkerUnavailableError,
)
from prismserve.protocol.channel import open_channel, secret_metadata
from prismserve.protocol.worker_pb2_grpc import WorkerStub

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from prismserve.core.types import WorkerInfo
    from prismserve.kv_transfer.index.base import KVIndex
    from prismserve.protocol import worker_pb2 as pb

REGISTRY_CACHE_S = 1.0
FORGET_S = 15.0
"""A worker that the registry has lost is remembered for so long: a registry that was emptied fills again by itself."""

T = TypeVar("T")


def translated(error: aio.AioRpcError, method: str, worker_id: str) -> PrismServeError:
    """A peer's gRPC error in our own tree."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError(f"{method} on worker {worker_id}: no answer before the deadline")
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return TransportError(f"{method} on worker {worker_id}: the worker cannot be reached")
    return TransportError(f"{method} on worker {worker_id}: {error.code().name} {error.details()}")


class Peer:
    """One other worker: its registration and a channel to its data-plane server.

    A channel is closed only when no call uses it, since closing one cancels the calls on it.
    """

    def __init__(self, info: WorkerInfo, secret: str) -> None:
        self.info = info
        self._channel = open_channel(info.control_address)
        self._stub: Any = WorkerStub(self._channel)  # type: ignore[no-untyped-call] # generated code is untyped
        self._metadata = secret_metadata(secret)
        self._calls = 0
        self._retired = False

    async def reserve(self, message: pb.ReserveRequest, timeout_s: float) -> pb.ReserveReply:
        """Ask for room."""
        return await self._call("Reserve", self._stub.Reserve, message, timeout_s)

    async def commit(self, message: pb.CommitRequest, timeout_s: float) -> pb.CommitReply:
        """State what was written."""
        return await self._call("Commit", self._stub.Commit, message, timeout_s)

    async def push(self, message: pb.PushRequest, timeout_s: float) -> pb.PushReply:
        """Ask for cached blocks or an embedding."""
        return await self._call("Push", self._stub.Push, message, timeout_s)

    async def _call(self, name: str, method: Callable[..., Awaitable[T]], message: object, timeout_s: float) -> T:
        if self._retired:
            text = f"{name} on worker {self.info.worker_id}: the worker has left the cluster"
            raise WorkerUnavailableError(text)
        self._calls += 1
        try:
            return await method(message, timeout=timeout_s, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise translated(error, name, self.info.worker_id) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # The call was cancelled, not the caller: left as it is, this would end the caller's task without a word.
            text = f"{name} on worker {self.info.worker_id}: the channel was closed"
            raise TransportError(text) from None
        finally:
            self._calls -= 1
            await self._close_when_left()

    async def retire(self) -> None:
        """Take no more calls, and close the channel as soon as those under way have ended."""
        self._retired = True
        await self._close_when_left()

    async def _close_when_left(self) -> None:
        if self._retired and not self._calls:
            await self.close()

    async def close(self) -> None:
        """Close the channel; calls under way fail with TransportError."""
        self._retired = True
        await self._channel.close(grace=None)


class PeerDirectory:
    """Finds workers by id. Only registered workers are ever connected to; used on one event loop.

    Args:
        index: the registry.
        secret: the cluster secret.
        clock: monotonic seconds.
    """

    def __init__(self, index: KVIndex, secret: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._index = index
        self._secret = secret
        self._clock = clock
        self._infos: dict[str, WorkerInfo] = {}
        self._seen_at: dict[str, float] = {}
        self._read_at = float("-inf")
        self._peers: dict[tuple[str, int], Peer] = {}
        self._refreshing: asyncio.Task[None] | None = None

    async def find(self, worker_id: str, epoch: int | None = None) -> Peer:
        """The worker of this id, and of this epoch if one is given; WorkerUnavailableError if it is not registered."""
        info = self._infos.get(worker_id)
        if info is None or (epoch is not None and info.epoch != epoch):
            await self._refresh()
            info = self._infos.get(worker_id)
        elif self._clock() - self._read_at >= REGISTRY_CACHE_S and (
            self._refreshing is None or self._refreshing.done()
        ):
            # Not waited for: a registry that does not answer must not hold up a request to a worker that is known.
            self._refreshing = asyncio.create_task(self._refresh(), name="registry-refresh")
        if info is None or (epoch is not None and info.epoch != epoch):
            suffix = "" if epoch is None else f" in epoch {epoch}"
            message = f"worker {worker_id} is not registered{suffix}"
            raise WorkerUnavailableError(message)
        peer = self._peers.get((worker_id, info.epoch))
        if peer is None:
            peer = self._peers[worker_id, info.epoch] = Peer(info, self._secret)
        return peer

    async def _refresh(self) -> None:
        """Read the registry; an unreachable one leaves what is known."""
        try:
            infos = await self._index.workers()
        except IndexUnavailableError:
            if not self._infos:
                raise
            return
        self._read_at = now_s = self._clock()
        for info in infos:
            self._infos[info.worker_id] = info
            self._seen_at[info.worker_id] = now_s
        for worker_id in [name for name, seen_at in self._seen_at.items() if now_s - seen_at > FORGET_S]:
            del self._infos[worker_id], self._seen_at[worker_id]
        live = {(info.worker_id, info.epoch) for info in self._infos.values()}
        for key in [key for key in self._peers if key not in live]:
            await self._peers.pop(key).retire()

    async def close(self) -> None:
        """Close every channel."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        for peer in self._peers.values():
            await peer.close()
        self._peers.clear()
