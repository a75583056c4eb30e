"""Stored forms of worker records and events: msgpack arrays with a version, a fixed schema and a length cap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import msgpack

from prismserve.core.errors import ConfigurationError
from prismserve.core.hashing import DIGEST_BYTES
from prismserve.core.types import KVLayout, Role, Tier, WorkerInfo, WorkerState
from prismserve.kv_transfer.index.base import EPOCH_MAX, check_worker_id
from prismserve.kv_transfer.index.events import EventKind, IndexEvent

RECORD_VERSION: Final = 2
RECORD_BYTES_MAX: Final = 64 * 1024
EVENT_KEYS_MAX: Final = 16_384
EVENT_BYTES_MAX: Final = RECORD_BYTES_MAX + 2 * EVENT_KEYS_MAX * DIGEST_BYTES

_TEXT_MAX: Final = 1024
_TRANSPORTS_MAX: Final = 32
_INFO_FIELDS: Final = 12
_LAYOUT_FIELDS: Final = 7
_EVENT_FIELDS: Final = 8

T = TypeVar("T")


def encode_worker(info: WorkerInfo) -> bytes:
    """Encode a worker record.

    Raises:
        ConfigurationError: the record is longer than 64 KiB.
    """
    layout = info.layout
    fields = [
        RECORD_VERSION,
        info.worker_id,
        info.role.value,
        info.epoch,
        info.pid,
        info.node,
        info.control_address,
        info.model_fingerprint,
        [
            layout.dtype,
            layout.layers,
            layout.kv_heads,
            layout.head_dim,
            layout.block_tokens,
            layout.position_scheme,
            layout.kv_format,
        ],
        list(info.transports),
        info.endpoint,
        info.state.value,
    ]
    data: bytes = msgpack.packb(fields, use_bin_type=True)
    if len(data) > RECORD_BYTES_MAX:
        message = f"the record of worker {info.worker_id!r} has {len(data)} bytes, the limit is {RECORD_BYTES_MAX}"
        raise ConfigurationError(message, field="endpoint")
    return data


def decode_worker(data: bytes) -> WorkerInfo:
    """Decode a worker record.

    Raises:
        ConfigurationError: another version wrote it, it is too long, or it is malformed.
    """
    fields = _unpack(data, RECORD_BYTES_MAX, _INFO_FIELDS, "worker record")
    worker_id = _text(fields[1], "worker_id")
    check_worker_id(worker_id)
    layout = fields[8]
    if not isinstance(layout, list) or len(layout) != _LAYOUT_FIELDS:
        raise _malformed("layout")
    transports = fields[9]
    if not isinstance(transports, list) or len(transports) > _TRANSPORTS_MAX:
        raise _malformed("transports")
    return WorkerInfo(
        worker_id=worker_id,
        role=_member(Role, fields[2], "role"),
        epoch=_integer(fields[3], "epoch"),
        pid=_integer(fields[4], "pid"),
        node=_text(fields[5], "node"),
        control_address=_text(fields[6], "control_address"),
        model_fingerprint=_binary(fields[7], "model_fingerprint"),
        layout=KVLayout(
            dtype=_text(layout[0], "dtype"),
            layers=_integer(layout[1], "layers"),
            kv_heads=_integer(layout[2], "kv_heads"),
            head_dim=_integer(layout[3], "head_dim"),
            block_tokens=_integer(layout[4], "block_tokens"),
            position_scheme=_text(layout[5], "position_scheme"),
            kv_format=_text(layout[6], "kv_format"),
        ),
        transports=tuple(_text(name, "transports") for name in transports),
        endpoint=_binary(fields[10], "endpoint"),
        state=_member(WorkerState, fields[11], "state"),
    )


def encode_event(event: IndexEvent) -> bytes:
    """Encode one event; keys are concatenated. At most 16,384 keys each way."""
    if len(event.added) > EVENT_KEYS_MAX or len(event.removed) > EVENT_KEYS_MAX:
        message = f"an event carries at most {EVENT_KEYS_MAX} keys each way"
        raise ConfigurationError(message, field="added")
    info = b"" if event.info is None else encode_worker(replace(event.info, epoch=event.epoch))
    fields = [
        RECORD_VERSION,
        int(event.kind),
        event.worker_id,
        event.epoch,
        b"".join(event.added),
        b"".join(event.removed),
        info,
        int(event.tier),
    ]
    data: bytes = msgpack.packb(fields, use_bin_type=True)
    return data


def decode_event(data: bytes) -> IndexEvent:
    """Decode one event.

    Raises:
        ConfigurationError: another version wrote it, it is too long, or it is malformed.
    """
    fields = _unpack(data, EVENT_BYTES_MAX, _EVENT_FIELDS, "index event")
    worker_id = _text(fields[2], "worker_id")
    check_worker_id(worker_id)
    kind = _member(EventKind, fields[1], "kind")
    record = _binary(fields[6], "info")
    info = decode_worker(record) if record else None
    if (kind in (EventKind.REGISTER, EventKind.STATE)) != (info is not None):
        raise _malformed("info")
    epoch = _integer(fields[3], "epoch")
    if info is not None and (info.worker_id != worker_id or info.epoch != epoch):
        raise _malformed("info")
    return IndexEvent(
        kind=kind,
        worker_id=worker_id,
        epoch=epoch,
        added=_keys(fields[4], "added"),
        removed=_keys(fields[5], "removed"),
        info=info,
        tier=_member(Tier, fields[7], "tier"),
    )


def _unpack(data: bytes, limit_bytes: int, fields: int, what: str) -> list[Any]:
    if len(data) > limit_bytes:
        message = f"a {what} has {len(data)} bytes, the limit is {limit_bytes}"
        raise ConfigurationError(message)
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True, max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        message = f"a {what} is not valid msgpack"
        raise ConfigurationError(message) from error
    if not isinstance(value, list) or not value or type(value[0]) is not int:
        message = f"a {what} has no version"
        raise ConfigurationError(message)
    if value[0] != RECORD_VERSION:
        message = (
            f"a {what} has version {value[0]}, this process reads version {RECORD_VERSION}: "
            "run one release of prismserve in the whole cluster"
        )
        raise ConfigurationError(message)
    if len(value) != fields:
        message = f"a {what} has {len(value)} fields, version {RECORD_VERSION} has {fields}"
        raise ConfigurationError(message)
    return value


def _malformed(field: str) -> ConfigurationError:
    return ConfigurationError(f"a stored record is malformed in {field}", field=field)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str) or len(value) > _TEXT_MAX:
        raise _malformed(field)
    return value


def _binary(value: object, field: str) -> bytes:
    if not isinstance(value, bytes):
        raise _malformed(field)
    return value


def _integer(value: object, field: str) -> int:
    if type(value) is not int or not 0 <= value <= EPOCH_MAX:
        raise _malformed(field)
    return value


def _member(kind: type[T], value: object, field: str) -> T:
    try:
        return kind(value)  # type: ignore[call-arg]
    except (ValueError, TypeError) as error:
        raise _malformed(field) from error


def _keys(value: object, field: str) -> Sequence[bytes]:
    joined = _binary(value, field)
    if len(joined) % DIGEST_BYTES or len(joined) > EVENT_KEYS_MAX * DIGEST_BYTES:
        raise _malformed(field)
    return [joined[start : start + DIGEST_BYTES] for start in range(0, len(joined), DIGEST_BYTES)]
