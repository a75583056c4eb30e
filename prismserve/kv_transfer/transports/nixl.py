"""NIXL over UCX: one-sided writes with a notification, over RDMA, TCP or shared memory, whatever UCX finds.

The arena is registered once. A peer's base address is learned once, from its endpoint; after that only offsets are
named. NIXL's own progress thread is off because it spins on a whole core even when nothing moves: the send loop
makes progress by asking for the state of writes, the receiver by asking for notifications while leases are open.

Writes go through the bindings that NIXL's Python API stands on. A write of 1 MiB between two processes of one machine
takes less than 200 microseconds, and with cold caches each call of a wrapper takes about one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

from pydantic import Field

from prismserve.core.config import FrozenConfig, PositiveInt
from prismserve.core.errors import ConfigurationError, TransportError
from prismserve.core.types import Extent
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.transports.base import POLL_BATCH_MAX, check_range, parse_endpoint
from prismserve.kv_transfer.wire import ENDPOINT_BYTES_MAX

_MODULES: Final = ("nixl", "nixl_cu12", "nixl_cu13")
_BACKEND: Final = "UCX"
_ANY_BACKEND: Final[list[int]] = []
_FLUSH_S: Final = 0.02
_log = logging.getLogger(__name__)


class NixlEndpoint(FrozenConfig):
    """The agent, what UCX needs to reach it, and where its arena begins."""

    agent: str = Field(min_length=1, max_length=300)
    metadata: bytes = Field(min_length=1, max_length=ENDPOINT_BYTES_MAX)
    base_address: PositiveInt
    landing_bytes: PositiveInt


class NixlTransport:
    """One agent, named after the worker and 64 random bits, over the worker's arena."""

    name: ClassVar[str] = "nixl"

    def __init__(self, worker_id: str, arena: Arena, config: TransferConfig) -> None:
        self._api = _load()
        self._errors = foreign_errors(self._api)
        self.arena = arena
        self.timeout_s = config.write_timeout_s
        self._name = f"{worker_id}-{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._arrived: list[bytes] = []
        self._orphans: list[tuple[int, Extent]] = []
        settings = self._api.nixl_agent_config(
            enable_prog_thread=False,
            backends=[_BACKEND],
            sync_mode=self._api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        self.calls = _Calls(self._api)
        try:
            self._agent: Any = self._api.nixl_agent(self._name, settings)
            self._registration = self._agent.register_memory(arena.memory)
            self._metadata = bytes(self._agent.get_agent_metadata())
        except self._errors as error:
            message = f"transport nixl: the {_BACKEND} backend cannot be used here: {error}"
            raise ConfigurationError(message, field="transfer.transports") from error

    def endpoint(self) -> Mapping[str, Any]:
        """Agent name, metadata, base address and length of the arena."""
        return NixlEndpoint(
            agent=self._name,
            metadata=self._metadata,
            base_address=self.arena.memory.data_ptr(),
            landing_bytes=self.arena.landing_bytes,
        ).model_dump()

    def reachable(self, endpoint: Mapping[str, Any]) -> bool:
        """Any well-formed peer but this agent itself; UCX finds the way."""
        return parse_endpoint(NixlEndpoint, endpoint, self.name).agent != self._name

    def connect(self, endpoint: Mapping[str, Any]) -> NixlLink:
        """Load the peer's metadata; TransportError if it cannot be used."""
        peer = parse_endpoint(NixlEndpoint, endpoint, self.name)
        with self.translated("connect"):
            found = self.agent.add_remote_agent(peer.metadata)
        loaded = found.decode() if isinstance(found, bytes) else str(found)
        if loaded != peer.agent:
            with self.translated("disconnect"):
                self.agent.remove_remote_agent(loaded)
            message = f"the peer's metadata belongs to agent {loaded!r}, its endpoint names {peer.agent!r}"
            raise TransportError(message)
        return NixlLink(self, peer)

    def poll(self) -> list[bytes]:
        """Notifications from every peer; also lets UCX make progress on writes into this arena."""
        if self._orphans:
            self._retry_orphans()
        self.progress()
        if not self._arrived:
            return []
        with self._lock:
            taken, self._arrived = self._arrived[:POLL_BATCH_MAX], self._arrived[POLL_BATCH_MAX:]
        return taken

    def progress(self) -> None:
        """Let UCX work; notifications that this brings up are kept for :meth:`poll`."""
        if self._agent is None:
            return
        try:
            with self._lock:
                for messages in self._agent.agent.getNotifs({}, _ANY_BACKEND).values():
                    self._arrived.extend(messages)
        except self._errors as error:
            raise self.broken("poll", error) from error

    def fileno(self) -> int | None:
        """None: NIXL offers nothing to wait on."""
        return None

    def close(self) -> None:
        """Deregister the arena and put the agent out of use; what is left of it goes with the process."""
        if self._agent is None:
            return
        self._retry_orphans()
        try:
            self._agent.deregister_memory(self._registration)
        except self._errors as error:
            _log.warning("the arena could not be deregistered from NIXL: %s", error)
        _keep_until_exit(self._agent)
        self._agent = None

    @property
    def agent(self) -> Any:
        """The NIXL agent; TransportError once closed."""
        if self._agent is None:
            message = "the nixl transport is closed"
            raise TransportError(message)
        return self._agent

    @contextlib.contextmanager
    def translated(self, action: str) -> Iterator[None]:
        """Turn whatever NIXL raises into TransportError."""
        try:
            yield
        except self._errors as error:
            raise self.broken(action, error) from error

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What NIXL raises; caught where a context manager would cost more than what it guards."""
        return self._errors

    def broken(self, action: str, error: Exception) -> TransportError:
        """One of NIXL's errors in our own tree."""
        return TransportError(f"nixl {action} failed: {type(error).__name__}: {error}")

    @property
    def bindings(self) -> Any:
        """What the agent's Python API stands on; TransportError once closed."""
        agent = self._agent
        if agent is None:
            message = "the nixl transport is closed"
            raise TransportError(message)
        return agent.agent

    def release(self, handle: int, extent: Extent) -> None:
        """Release a write and its staging pages; one that cannot be cancelled keeps both until it can."""
        try:
            self.bindings.releaseXferReq(handle)
        except self._errors as error:
            _log.warning("a NIXL write could not be cancelled yet, its staging pages stay in use: %s", error)
            with self._lock:
                self._orphans.append((handle, extent))
            return
        self.arena.free(extent)

    def _retry_orphans(self) -> None:
        with self._lock:
            waiting, self._orphans = self._orphans, []
        for handle, extent in waiting:
            try:
                self.bindings.releaseXferReq(handle)
            except self._errors:
                with self._lock:
                    self._orphans.append((handle, extent))
            else:
                self.arena.free(extent)


class NixlLink:
    """To one remote agent."""

    def __init__(self, owner: NixlTransport, peer: NixlEndpoint) -> None:
        self.transport = NixlTransport.name
        self.peer = peer
        self._owner = owner
        self._closed = False
        self._landing_bytes = peer.landing_bytes
        self._target = (peer.agent, peer.base_address)

    def stage(self, offset_bytes: int, nbytes: int) -> NixlWrite:
        """Pages of this worker's registered staging region."""
        if self._closed:
            message = "the link is closed"
            raise TransportError(message)
        check_range(offset_bytes, nbytes, self._landing_bytes)
        return NixlWrite(self._owner, self._target, offset_bytes, nbytes)

    def notify(self, notification: bytes) -> NixlNotice:
        """A notification of its own."""
        with self._owner.translated("notify"):
            self._owner.agent.send_notif(self.peer.agent, notification)
        return NixlNotice(self._owner)

    def close(self) -> None:
        """Disconnect from the agent."""
        if self._closed:
            return
        self._closed = True
        try:
            with self._owner.translated("disconnect"):
                self._owner.agent.remove_remote_agent(self.peer.agent)
        except TransportError as error:
            _log.debug("disconnecting from a broken peer: %s", error)


class NixlNotice:
    """A lone notification: handed to UCX, which needs to be driven a little longer to put it on the wire."""

    def __init__(self, owner: NixlTransport) -> None:
        self._owner = owner
        self._until_s = time.monotonic() + _FLUSH_S

    def poll(self) -> bool:
        """Drive UCX; True when that has gone on for long enough."""
        self._owner.progress()
        return time.monotonic() >= self._until_s

    def cancel(self) -> None:
        """Nothing is held."""


class NixlWrite:
    """Staging pages bound for the peer; ``target`` is its agent and the address of its arena."""

    __slots__ = ("_extent", "_offset_bytes", "_owner", "_target", "buffer")

    def __init__(self, owner: NixlTransport, target: tuple[str, int], offset_bytes: int, nbytes: int) -> None:
        self._owner = owner
        self._target = target
        self._offset_bytes = offset_bytes
        self._extent, self.buffer = owner.arena.stage(nbytes)

    def submit(self, notification: bytes) -> NixlHandle:
        """Post one WRITE of the whole buffer."""
        owner, buffer = self._owner, self.buffer
        calls, nbytes = owner.calls, buffer.numel()
        agent, base_address = self._target
        try:
            source = calls.descriptors(calls.memory, [(buffer.data_ptr(), nbytes, 0)])
            target = calls.descriptors(calls.memory, [(base_address + self._offset_bytes, nbytes, 0)])
            handle = owner.bindings.createXferReq(calls.write, source, target, agent, notification, _ANY_BACKEND)
        except owner.errors as error:
            self.discard()
            raise owner.broken("write", error) from error
        return NixlHandle(owner, handle, self._extent)

    def discard(self) -> None:
        """Free the staging pages."""
        self._owner.arena.free(self._extent)


class NixlHandle:
    """A posted write: owns its staging pages until it is done, failed or cancelled."""

    __slots__ = ("_deadline_s", "_done", "_extent", "_handle", "_owner", "_posted")

    def __init__(self, owner: NixlTransport, handle: int, extent: Extent) -> None:
        self._owner = owner
        self._handle = handle
        self._extent = extent
        self._deadline_s = time.monotonic() + owner.timeout_s
        self._posted = False
        self._done = False

    def poll(self) -> bool:
        """Ask NIXL; releases the pages when the write is over, one way or the other."""
        if self._done:
            return True
        owner = self._owner
        try:
            bindings = owner.bindings
            state = bindings.getXferStatus(self._handle) if self._posted else bindings.postXferReq(self._handle, b"")
        except owner.errors as error:
            self.cancel()
            raise owner.broken("write", error) from error
        except TransportError:
            self.cancel()
            raise
        self._posted = True
        calls = owner.calls
        if state == calls.success:
            self.cancel()
            return True
        if state == calls.in_progress and time.monotonic() < self._deadline_s:
            return False
        self.cancel()
        message = (
            f"nixl write ended in state {state.name}"
            if state != calls.in_progress
            else "nixl write reached its deadline"
        )
        raise TransportError(message)

    def cancel(self) -> None:
        """Release the write and its pages."""
        if not self._done:
            self._done = True
            self._owner.release(self._handle, self._extent)


class _Calls:
    """What writes need of NIXL's bindings beside an agent."""

    __slots__ = ("descriptors", "in_progress", "memory", "success", "write")

    def __init__(self, api: Any) -> None:
        bind = api.nixlBind
        self.descriptors = bind.nixlXferDList
        self.memory = bind.DRAM_SEG
        self.write = bind.NIXL_WRITE
        self.success = bind.NIXL_SUCCESS
        self.in_progress = bind.NIXL_IN_PROG


def _keep_until_exit(agent: Any) -> None:
    """Never run the agent's destructor.

    It destroys the UCX worker, and UCX aborts the whole process (``ucs_arbiter_group_is_empty``) when an endpoint of
    a peer that died still has operations queued. A worker process has one agent, so nothing accumulates.
    """
    for part in (agent, agent.agent):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))


def _load() -> Any:
    """The NIXL Python API of whichever wheel is installed."""
    for module in _MODULES:
        try:
            api = importlib.import_module(f"{module}._api")
        except ImportError:
            continue
        api.logger.setLevel(logging.WARNING)
        return api
    message = f"transport nixl: none of {', '.join(_MODULES)} can be imported; install nixl or drop it from transports"
    raise ConfigurationError(message, field="transfer.transports")


def foreign_errors(api: Any) -> tuple[type[Exception], ...]:
    """Everything NIXL raises: its own error classes, and what its bindings raise for bad arguments."""
    own = [
        value
        for name, value in vars(api.nixlBind).items()
        if name.endswith("Error") and isinstance(value, type) and issubclass(value, Exception)
    ]
    return (*own, RuntimeError, ValueError, TypeError, KeyError)


TRANSPORT = NixlTransport
