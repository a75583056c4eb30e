"""What a transport does, and how one is found by name.

A write is staged, filled, and submitted::

    staged = link.stage(offset_bytes, nbytes)     # offset in the peer's arena, from its reservation
    encode_into(staged.buffer)                    # peer memory itself (shm, local) or registered staging (nixl)
    handle = staged.submit(notification)
    while not handle.poll(): ...                  # the notification arrives after the bytes, never before

Nothing here blocks. Methods of links, staged writes and handles are called from one thread (the send loop);
``poll`` of a transport from another (the receiver); ``endpoint`` and ``close`` from any.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeVar, cast

from pydantic import ValidationError

from prismserve.core.config import FrozenConfig
from prismserve.core.errors import ConfigurationError, TransportError

if TYPE_CHECKING:
    import torch

    from prismserve.kv_transfer.arena import Arena
    from prismserve.kv_transfer.config import TransferConfig

_PACKAGE: Final = "prismserve.kv_transfer.transports"
POLL_BATCH_MAX: Final = 1024
"""Most notifications one call of ``Transport.poll`` returns."""

EndpointT = TypeVar("EndpointT", bound=FrozenConfig)


class WriteHandle(Protocol):
    """A write, or a lone notification, that has started."""

    def poll(self) -> bool:
        """Advance; True once the bytes and the notification are with the peer. TransportError if they never will be."""
        ...

    def cancel(self) -> None:
        """Give up and release what the write holds on this side. Harmless when done."""
        ...


class StagedWrite(Protocol):
    """Memory to encode into, bound for one place in the peer's arena."""

    buffer: torch.Tensor
    """uint8 [nbytes]; may be the peer's own memory."""

    def submit(self, notification: bytes) -> WriteHandle:
        """Start the write; the notification follows the bytes. TransportError if it cannot start."""
        ...

    def discard(self) -> None:
        """Release the memory instead of writing it."""
        ...


class Link(Protocol):
    """One direction, this worker to one peer, over one transport."""

    transport: str

    def stage(self, offset_bytes: int, nbytes: int) -> StagedWrite:
        """Prepare a write at a byte offset of the peer's arena.

        Raises:
            OverloadedError: no staging memory now; try again when a write has finished.
            TransportError: the range leaves what the peer may grant, or the link is broken.
        """
        ...

    def notify(self, notification: bytes) -> WriteHandle:
        """Send a notification without bytes."""
        ...

    def close(self) -> None:
        """Forget the peer; writes in flight fail. Harmless when closed."""
        ...


class Transport(Protocol):
    """One worker's side of one way to move bytes.

    The constructor takes ``(worker_id: str, arena: Arena, config: TransferConfig)``, registers the arena, and raises
    ConfigurationError if this machine cannot do it.
    """

    name: ClassVar[str]

    def endpoint(self) -> Mapping[str, Any]:
        """Plain data (str, int, bytes) by which a peer connects; no secret that grants more than a connection."""
        ...

    def reachable(self, endpoint: Mapping[str, Any]) -> bool:
        """Whether that peer could be connected to from here (for instance: is it on this node)."""
        ...

    def connect(self, endpoint: Mapping[str, Any]) -> Link:
        """Open a link; TransportError if it cannot be."""
        ...

    def poll(self) -> list[bytes]:
        """Notifications that have arrived, unverified, at most ``POLL_BATCH_MAX``; also makes progress."""
        ...

    def fileno(self) -> int | None:
        """A descriptor that turns readable when :meth:`poll` has something; None if it must be asked."""
        ...

    def close(self) -> None:
        """Release everything. Harmless when closed."""
        ...


class TransportFactory(Protocol):
    """The constructor of a transport."""

    def __call__(self, worker_id: str, arena: Arena, config: TransferConfig) -> Transport:
        """Open the transport over an arena."""
        ...


@functools.cache
def names() -> tuple[str, ...]:
    """The transports there are, sorted."""
    package = importlib.import_module(_PACKAGE)
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in found if name != "base" and not name.startswith("_")))


def factory(name: str) -> TransportFactory:
    """The transport of this name; ConfigurationError lists those there are."""
    if name not in names():
        message = f"transfer.transports: unknown transport {name!r}; available: {', '.join(names())}"
        raise ConfigurationError(message, field="transfer.transports")
    return cast("TransportFactory", importlib.import_module(f"{_PACKAGE}.{name}").TRANSPORT)


def parse_endpoint(model: type[EndpointT], endpoint: Mapping[str, Any], transport: str) -> EndpointT:
    """Validate a peer's entry; TransportError says what is wrong with it."""
    try:
        return model.model_validate(dict(endpoint))
    except ValidationError as error:
        message = f"the peer's {transport} endpoint is malformed: {error.errors()[0]['msg']}"
        raise TransportError(message) from None


def check_range(offset_bytes: int, nbytes: int, landing_bytes: int) -> None:
    """TransportError unless the range lies in the part of the peer's arena that it grants leases on."""
    if offset_bytes < 0 or nbytes < 0 or offset_bytes + nbytes > landing_bytes:
        message = f"bytes {offset_bytes} to {offset_bytes + nbytes} leave the peer's {landing_bytes} landing bytes"
        raise TransportError(message)
