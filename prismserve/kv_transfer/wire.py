r"""What crosses the wire beside KV itself: notifications and endpoints, both msgpack with a fixed schema and a cap.

A notification is one msgpack array of at most 96 bytes. ``PAYLOAD`` says that one encoded piece now lies in the
receiver's extent; ``END`` that the sender will write no more under the lease::

    [version=1, kind=1, lease_id, generation, layer, start_token, tokens, offset_bytes, encoded_bytes, checksum]
    [version=1, kind=2, lease_id, generation]

``checksum`` is 16 bytes, XXH3-128 (canonical, big-endian) over the encoded bytes; every other field is an integer,
``layer`` at least -1, all others at least 0. Addresses never appear: ``offset_bytes`` counts from the start of the
leased extent, which the receiver alone translates. A notification grants nothing: it names a lease by its 63 random
bits and its generation, and is dropped and counted if either is wrong.

An endpoint is a msgpack map ``{"version": 1, "worker_id": str, "transports": {name: {...}}}`` of at most 64 KiB; each
transport defines and validates its own entry.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgpack
import xxhash
from pydantic import Field, ValidationError

from prismserve.core.config import FrozenConfig
from prismserve.core.errors import TransferError
from prismserve.core.types import Payload

NOTIFICATION_BYTES_MAX: Final = 96
ENDPOINT_BYTES_MAX: Final = 65536
CHECKSUM_BYTES: Final = 16
_VERSION = 1
_PAYLOAD = 1
_END = 2
_PAYLOAD_FIELDS = 10
_END_FIELDS = 4
_TRANSPORTS_MAX = 16


class Notification:
    """One decoded notification; ``payload`` None means END."""

    __slots__ = ("generation", "lease_id", "payload")

    def __init__(self, lease_id: int, generation: int, payload: Payload | None) -> None:
        self.lease_id = lease_id
        self.generation = generation
        self.payload = payload


class Endpoint(FrozenConfig):
    """How to reach a worker's transports; the entries are validated by the transports themselves."""

    version: Literal[1] = 1
    worker_id: Annotated[str, Field(min_length=1, max_length=256)]
    transports: Annotated[dict[str, dict[str, Any]], Field(max_length=_TRANSPORTS_MAX)]


def checksum(data: Any) -> bytes:
    """16 bytes of XXH3-128 over a C-contiguous buffer, without copying it."""
    return xxhash.xxh3_128_digest(data)


def encode_payload(lease_id: int, generation: int, payload: Payload) -> bytes:
    """The PAYLOAD notification."""
    fields = (
        _VERSION,
        _PAYLOAD,
        lease_id,
        generation,
        payload.layer,
        payload.start_token,
        payload.tokens,
        payload.offset_bytes,
        payload.encoded_bytes,
        payload.checksum,
    )
    return bytes(msgpack.packb(fields))


def encode_end(lease_id: int, generation: int) -> bytes:
    """The END notification."""
    return bytes(msgpack.packb((_VERSION, _END, lease_id, generation)))


def decode_notification(raw: bytes) -> Notification:
    """Parse and validate; TransferError on anything that is not exactly a notification of this version."""
    fields = _unpack(raw, NOTIFICATION_BYTES_MAX, max_array_len=_PAYLOAD_FIELDS, max_bin_len=CHECKSUM_BYTES)
    if not isinstance(fields, tuple) or len(fields) < _END_FIELDS:
        message = "a transfer notification must be an array of integers"
        raise TransferError(message)
    numbers = fields if len(fields) == _END_FIELDS else fields[:-1]
    if any(type(number) is not int or number < -1 for number in numbers) or fields[0] != _VERSION:
        message = "a transfer notification has a field of the wrong type, or another version"
        raise TransferError(message)
    if fields[1] == _END and len(fields) == _END_FIELDS:
        return Notification(fields[2], fields[3], None)
    if fields[1] != _PAYLOAD or len(fields) != _PAYLOAD_FIELDS:
        message = "a transfer notification is of no known kind"
        raise TransferError(message)
    digest = fields[-1]
    if not isinstance(digest, bytes) or len(digest) != CHECKSUM_BYTES or min(numbers[5:]) < 0:
        message = "a transfer notification has a checksum or a range that cannot be"
        raise TransferError(message)
    return Notification(fields[2], fields[3], Payload(*fields[4:]))


def encode_endpoint(endpoint: Endpoint) -> bytes:
    """Serialise; TransferError if it exceeds the cap."""
    raw = bytes(msgpack.packb(endpoint.model_dump()))
    if len(raw) > ENDPOINT_BYTES_MAX:
        message = f"the transfer endpoint has {len(raw)} bytes; the limit is {ENDPOINT_BYTES_MAX}"
        raise TransferError(message)
    return raw


def decode_endpoint(raw: bytes) -> Endpoint:
    """Parse and validate; TransferError on anything else than an endpoint of this version."""
    value = _unpack(raw, ENDPOINT_BYTES_MAX, max_map_len=64, max_bin_len=ENDPOINT_BYTES_MAX)
    try:
        return Endpoint.model_validate(value)
    except ValidationError as error:
        message = f"the transfer endpoint is malformed: {error.errors()[0]['msg']}"
        raise TransferError(message) from None


def _unpack(raw: bytes, limit: int, **limits: int) -> Any:
    if len(raw) > limit:
        message = f"a transfer message has {len(raw)} bytes; the limit is {limit}"
        raise TransferError(message)
    try:
        return msgpack.unpackb(raw, use_list=False, max_str_len=1024, max_ext_len=0, **limits)
    except (ValueError, msgpack.UnpackException) as error:
        message = f"a transfer message is not msgpack of the expected shape: {type(error).__name__}"
        raise TransferError(message) from None
