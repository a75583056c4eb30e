"""KV on its way: extents, reservations, payloads, manifests."""

from __future__ import annotations

from dataclasses import dataclass

from prismserve.core.types.compression import MethodSpec
from prismserve.core.types.output import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of arena pages, the only way one worker names another's memory.

    ``generation`` is the arena's tag for this allocation: a write or notification under another tag is refused.
    """

    first_page: int
    pages: int
    generation: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A lease on pages of the receiver's arena, granted for one request attempt.

    Attributes:
        lease_id: names the lease at the receiver.
        extent: where the sender may write; ``page_bytes`` is the arena's page size.
        cached_tokens: leading prompt tokens the receiver already holds and does not want sent.
        ttl_s: the lease ends this long after it was granted, by the receiver's monotonic clock.
    """

    lease_id: int
    extent: Extent
    page_bytes: int
    cached_tokens: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Payload:
    """One encoded piece of KV as it lies in the receiver's extent.

    Attributes:
        layer: decoder layer, or -1 for an image embedding.
        start_token: first cache slot it covers.
        tokens: how many slots.
        offset_bytes: from the start of the extent.
        encoded_bytes: length.
        checksum: 16 bytes, XXH3-128 over the encoded bytes.
        codec: how it is encoded, as a place in ``compression.wire.table`` of the transfer's codec; 0 for an embedding.
    """

    layer: int
    start_token: int
    tokens: int
    offset_bytes: int
    encoded_bytes: int
    checksum: bytes
    codec: int = 0


MANIFEST_VERSION = 2


@dataclass(frozen=True, slots=True)
class Manifest:
    """What must have arrived before decode starts.

    Attributes:
        source_worker: who wrote it, with its epoch.
        layer_tokens: cache length per layer after this transfer (ragged after in-model pruning).
        next_position: position of the first generated token.
        first_token_ids: tokens sampled by the prefill side (usually one).
        first_logprobs: of those tokens, if the request asked for them; else empty.
        raw_bytes: what the same KV would have taken without codec, for the usage report.
    """

    request_id: str
    attempt: int
    source_worker: str
    source_epoch: int
    namespace: bytes
    layout_fingerprint: bytes
    codec: MethodSpec
    layer_tokens: tuple[int, ...]
    next_position: int
    first_token_ids: tuple[int, ...]
    payloads: tuple[Payload, ...]
    raw_bytes: int
    version: int = MANIFEST_VERSION
    first_logprobs: tuple[TokenLogprobs, ...] = ()
