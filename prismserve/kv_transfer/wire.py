r"""What crosses the wire beside KV itself: notifications and endpoints, both msgpack with a fixed schema and a cap.

A notification is one msgpack array of at most 1280 bytes. ``PAYLOADS`` says that 1 to 16 encoded pieces now lie in the
receiver's extent; ``END`` that the sender will write no more under the lease; ``PROBE`` means nothing and lets a sender
measure a link::

    [version=2, kind=1, lease_id, generation, [[layer, start_token, tokens, offset_bytes, encoded_bytes, codec,
                                                checksum], ...]]
    [version=2, kind=2, lease_id, generation]
    [version=2, kind=3]

``checksum`` is 16 bytes, XXH3-128 (canonical, big-endian) over the encoded bytes; every other field is an integer,
``layer`` at least -1, all others at least 0. Addresses never appear: ``offset_bytes`` counts from the start of the
leased extent, which the receiver alone translates. A notification grants nothing: it names a lease by its 63 random
bits and its generation, and is dropped and counted if either is wrong.

An endpoint is a msgpack map ``{"version": 2, "worker_id": str, "probe": [offset_bytes, nbytes], "transports": {name:
{...}}}`` of at most 64 KiB; each transport defines and validates its own entry. ``probe`` is a part of the arena that
holds nothing, which any peer may write to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgpack
import xxhash
from pydantic import Field, ValidationError

from prismserve.core.config import FrozenConfig, NonNegativeInt
from prismserve.core.errors import TransferError
from prismserve.core.types import Payload

NOTIFICATION_BYTES_MAX: Final = 1280
PAYLOADS_MAX: Final = 16
"""Most pieces one notification announces."""
ENDPOINT_BYTES_MAX: Final = 65536
CHECKSUM_BYTES: Final = 16
_VERSION = 2
_PAYLOADS = 1
_END = 2
_PROBE = 3
_PAYLOAD_FIELDS = 7
_FIELDS = {_PAYLOADS: 5, _END: 4, _PROBE: 2}
_TRANSPORTS_MAX = 16


class Notification:
    """One decoded notification; without payloads it means END, without a lease PROBE."""

    __slots__ = ("generation", "lease_id", "payloads")

    def __init__(self, lease_id: int, generation: int, payloads: tuple[Payload, ...]) -> None:
        self.lease_id = lease_id
        self.generation = generation
        self.payloads = payloads


class Endpoint(FrozenConfig):
    """How to reach a worker's transports; the entries are validated by the transports themselves."""

    version: Literal[2] = 2
    worker_id: Annotated[str, Field(min_length=1, max_length=256)]
    probe: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    transports: Annotated[dict[str, dict[str, Any]], Field(max_length=_TRANSPORTS_MAX)]


def checksum(data: Any) -> bytes:
    """16 bytes of XXH3-128 over a C-contiguous buffer, without copying it."""
    return xxhash.xxh3_128_digest(data)


class Checksum:
    """XXH3-128 over bytes that lie in several places."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: Any) -> None:
        """Go on with a C-contiguous buffer."""
        self._state.update(data)

    def digest(self) -> bytes:
        """16 bytes."""
        return self._state.digest()


def encode_payloads(lease_id: int, generation: int, payloads: Sequence[Payload]) -> bytes:
    """The PAYLOADS notification of 1 to 16 pieces."""
    pieces = [
        (
            payload.layer,
            payload.start_token,
            payload.tokens,
            payload.offset_bytes,
            payload.encoded_bytes,
            payload.codec,
            payload.checksum,
        )
        for payload in payloads
    ]
    return bytes(msgpack.packb((_VERSION, _PAYLOADS, lease_id, generation, pieces)))


def encode_end(lease_id: int, generation: int) -> bytes:
    """The END notification."""
    return bytes(msgpack.packb((_VERSION, _END, lease_id, generation)))


def encode_probe() -> bytes:
    """The PROBE notification."""
    return bytes(msgpack.packb((_VERSION, _PROBE)))


def decode_notification(raw: bytes) -> Notification | None:
    """Parse and validate; None for PROBE; TransferError on anything that is not a notification of this version."""
    fields = _unpack(raw, NOTIFICATION_BYTES_MAX, max_array_len=PAYLOADS_MAX, max_bin_len=CHECKSUM_BYTES)
    if not isinstance(fields, tuple) or not fields or not _are_numbers(fields[:4]) or fields[0] != _VERSION:
        message = "a transfer notification is no array of integers, or of another version"
        raise TransferError(message)
    kind = fields[1] if len(fields) > 1 else 0
    if _FIELDS.get(kind) != len(fields):
        message = "a transfer notification is of no known kind"
        raise TransferError(message)
    if kind == _PROBE:
        return None
    pieces = fields[4] if kind == _PAYLOADS else ()
    if not isinstance(pieces, tuple) or (not pieces and kind == _PAYLOADS):
        message = "a transfer notification announces no payloads"
        raise TransferError(message)
    return Notification(fields[2], fields[3], tuple(map(_payload, pieces)))


def _payload(fields: Any) -> Payload:
    if not isinstance(fields, tuple) or len(fields) != _PAYLOAD_FIELDS or not _are_numbers(fields[:-1], least=-1):
        message = "a payload in a transfer notification has a field of the wrong type"
        raise TransferError(message)
    digest = fields[-1]
    if not isinstance(digest, bytes) or len(digest) != CHECKSUM_BYTES or min(fields[1:-1]) < 0:
        message = "a transfer notification has a checksum or a range that cannot be"
        raise TransferError(message)
    layer, start_token, tokens, offset_bytes, nbytes, codec, _ = fields
    return Payload(layer, start_token, tokens, offset_bytes, nbytes, digest, codec)


def _are_numbers(fields: Sequence[Any], least: int = 0) -> bool:
    return all(type(number) is int and number >= least for number in fields)


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
