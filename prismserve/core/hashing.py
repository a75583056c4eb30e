"""Keyed 256-bit digests, and the chained keys of prefix blocks (never truncated)."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

DIGEST_BYTES: Final = 32
_DOMAIN_BYTES: Final = 16


def _domain_key(domain: str) -> bytes:
    encoded = domain.encode()
    if len(encoded) > _DOMAIN_BYTES:
        message = f"hash domain {domain!r} is longer than {_DOMAIN_BYTES} bytes"
        raise ValueError(message)
    return encoded.ljust(_DOMAIN_BYTES, b"\0")


def digest(domain: str, *parts: bytes) -> bytes:
    """Hash length-prefixed parts under a domain.

    Args:
        domain: purpose of the digest, at most 16 bytes; two domains never collide.
        parts: byte strings; their boundaries are part of the input.

    Returns:
        32 bytes (BLAKE2b-256, personalised by the domain).
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES, person=_domain_key(domain))
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def canonical_json(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """Encode plain data so that equal values give equal bytes (sorted keys, no spaces, no NaN)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def pack_ids(ids: Iterable[int]) -> bytes:
    """Encode token ids as consecutive little-endian int64."""
    values = tuple(ids)
    return struct.pack(f"<{len(values)}q", *values)
