"""What both clients need to open a channel: addresses, limits, credentials."""

from __future__ import annotations

import re
from typing import Final

from prismserve.client.errors import ClientClosedError, RequestError

DEFAULT_TARGET: Final = "127.0.0.1:9000"
DEFAULT_TIMEOUT_S: Final = 600.0
_MESSAGE_BYTES_MAX: Final = 256 << 20
_TARGET: Final = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):\d{1,5}|(unix|dns|ipv4|ipv6|xds):\S+")

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
    # A retry within the first second must find a channel that has tried to connect again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # One owner of retries: this SDK's policy.
    ("grpc.enable_retries", 0),
)


def checked_target(target: str) -> str:
    """``target`` itself; RequestError unless it is ``host:port`` or a gRPC name."""
    if not _TARGET.fullmatch(target):
        message = f"target: {target!r} is not an address; write host:port, such as {DEFAULT_TARGET}"
        raise RequestError(message, field="target")
    return target


def metadata_of(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata sent with every call."""
    if api_key is None:
        return ()
    if not api_key or not api_key.isascii() or not api_key.isprintable():
        message = "api_key: must be printable ASCII"
        raise RequestError(message, field="api_key")
    return (("authorization", f"Bearer {api_key}"),)


def closed_error() -> ClientClosedError:
    """What a call on a closed client raises."""
    return ClientClosedError("the client is closed; make a new one")
