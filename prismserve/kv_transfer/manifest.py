"""Manifests: what the sender states it wrote, and what the receiver must find it to be. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prismserve.compression.wire import table
from prismserve.core.errors import IncompatibleLayoutError, LeaseExpiredError, TransferError
from prismserve.core.types import MANIFEST_VERSION, KVLayout, Manifest, MethodSpec, Payload, TokenLogprobs
from prismserve.kv_transfer.plan import RAW_LAYER, encoded_bytes
from prismserve.kv_transfer.wire import CHECKSUM_BYTES


@dataclass(frozen=True, slots=True)
class Expected:
    """What a lease was granted for; a manifest under it must agree in every field.

    Attributes:
        request_id: whose KV it is (or, for an embedding, the request that wants it).
        attempt: placement of that request.
        source_worker: who may send, with its epoch.
        namespace: 32 bytes, root of the key chain of the KV as it arrives.
        codec: how pieces are encoded.
        prompt_tokens: cache slots per layer (or embedding rows) there is room for; nothing may reach beyond.
        cached_tokens: leading tokens that are here already and must not be sent.
        source_layout: of the sender's KV, where it is not the receiver's own; see
            :mod:`prismserve.kv_transfer.conversion`.
    """

    request_id: str
    attempt: int
    source_worker: str
    source_epoch: int
    namespace: bytes
    codec: MethodSpec
    prompt_tokens: int
    cached_tokens: int = 0
    source_layout: KVLayout | None = None


def build(
    expected: Expected,
    layout: KVLayout,
    payloads: Sequence[Payload],
    *,
    layer_tokens: Sequence[int],
    next_position: int,
    first_token_ids: Sequence[int] = (),
    first_logprobs: Sequence[TokenLogprobs] = (),
) -> Manifest:
    """State what was written.

    Args:
        expected: what the receiver was asked to expect.
        layout: of the sender's KV.
        payloads: what ``Outgoing.finish`` returned.
        layer_tokens: cache length per layer after the transfer; empty for an embedding.
        next_position: position of the first generated token.
        first_token_ids: tokens the prefill side sampled.
        first_logprobs: of those tokens, if the request asked for them.
    """
    kv_tokens = sum(payload.tokens for payload in payloads if payload.layer != RAW_LAYER)
    raw_bytes = sum(payload.encoded_bytes for payload in payloads if payload.layer == RAW_LAYER)
    return Manifest(
        request_id=expected.request_id,
        attempt=expected.attempt,
        source_worker=expected.source_worker,
        source_epoch=expected.source_epoch,
        namespace=expected.namespace,
        layout_fingerprint=layout.fingerprint(),
        codec=expected.codec,
        layer_tokens=tuple(layer_tokens),
        next_position=next_position,
        first_token_ids=tuple(first_token_ids),
        payloads=tuple(payloads),
        raw_bytes=raw_bytes + kv_tokens * layout.token_layer_bytes,
        first_logprobs=tuple(first_logprobs),
    )


def verify(manifest: Manifest, expected: Expected, layout: KVLayout, extent_bytes: int) -> None:
    """Check everything that can be known without the bytes themselves.

    Args:
        manifest: what the sender states.
        expected: what the lease was granted for.
        layout: of the receiver's KV.
        extent_bytes: size of the lease's extent.

    Raises:
        LeaseExpiredError: the manifest is of another attempt, worker or epoch.
        IncompatibleLayoutError: version, layout, namespace or codec differ; the message names both sides.
        TransferError: payloads are missing, overlap, leave the extent, or have impossible sizes.
    """
    layout = expected.source_layout or layout
    _check_identity(manifest, expected)
    _check_interchangeable(manifest, expected, layout)
    _check_ranges(manifest.payloads, extent_bytes)
    longest = max((payload.start_token + payload.tokens for payload in manifest.payloads), default=0)
    if max((longest, *manifest.layer_tokens)) > expected.prompt_tokens:
        message = f"the manifest reaches beyond the {expected.prompt_tokens} tokens there is room for"
        raise TransferError(message, field="layer_tokens", request_id=expected.request_id)
    if manifest.layer_tokens:
        if len(manifest.layer_tokens) != layout.layers:
            message = f"the manifest has {len(manifest.layer_tokens)} layers, this worker {layout.layers}"
            raise IncompatibleLayoutError(message, field="layer_tokens", request_id=manifest.request_id)
        _check_kv(manifest, expected, layout)
    else:
        _check_raw(manifest)


def _check_identity(manifest: Manifest, expected: Expected) -> None:
    for field in ("request_id", "attempt", "source_worker", "source_epoch"):
        stated, granted = getattr(manifest, field), getattr(expected, field)
        if stated != granted:
            message = f"the manifest's {field} is {stated!r}, the lease was granted for {granted!r}"
            raise LeaseExpiredError(message, field=field, request_id=expected.request_id)


def _check_interchangeable(manifest: Manifest, expected: Expected, layout: KVLayout) -> None:
    here, there = "this worker", f"worker {manifest.source_worker}"
    if manifest.version != MANIFEST_VERSION:
        older = there if manifest.version < MANIFEST_VERSION else here
        message = f"{there} writes manifests of version {manifest.version}, {here} {MANIFEST_VERSION}; upgrade {older}"
        raise IncompatibleLayoutError(message, field="version", request_id=manifest.request_id)
    if manifest.layout_fingerprint != layout.fingerprint():
        message = f"the KV of {there} has not the layout that {here} reserved room for ({layout})"
        raise IncompatibleLayoutError(message, field="layout_fingerprint", request_id=manifest.request_id)
    if manifest.namespace != expected.namespace:
        message = f"the KV of {there} belongs to another key namespace than {here} reserved room for"
        raise IncompatibleLayoutError(message, field="namespace", request_id=manifest.request_id)
    if manifest.codec != expected.codec:
        message = f"{there} encoded with {manifest.codec}, {here} reserved room for {expected.codec}"
        raise IncompatibleLayoutError(message, field="codec", request_id=manifest.request_id)


def _check_ranges(payloads: Iterable[Payload], extent_bytes: int) -> None:
    end = 0
    for payload in sorted(payloads, key=lambda piece: piece.offset_bytes):
        if payload.offset_bytes < end or payload.encoded_bytes < 0:
            message = f"payloads overlap at byte {payload.offset_bytes} of the extent"
            raise TransferError(message, field="offset_bytes")
        end = payload.offset_bytes + payload.encoded_bytes
        if len(payload.checksum) != CHECKSUM_BYTES:
            message = f"a checksum has {len(payload.checksum)} bytes and must have {CHECKSUM_BYTES}"
            raise TransferError(message, field="checksum")
    if end > extent_bytes:
        message = f"payloads end at byte {end} of an extent of {extent_bytes}"
        raise TransferError(message, field="offset_bytes")


def _check_kv(manifest: Manifest, expected: Expected, layout: KVLayout) -> None:
    pieces: defaultdict[int, list[Payload]] = defaultdict(list)
    codecs = table(expected.codec)
    for payload in manifest.payloads:
        pieces[payload.layer].append(payload)
        if payload.codec >= len(codecs):
            message = f"a payload of layer {payload.layer} names codec {payload.codec} of {len(codecs)}"
            raise TransferError(message, field="codec", request_id=manifest.request_id)
        codec = codecs[payload.codec]
        if payload.tokens < 1 or payload.encoded_bytes != encoded_bytes(payload.tokens, codec, layout):
            message = (
                f"a payload of {payload.tokens} tokens of layer {payload.layer} cannot have "
                f"{payload.encoded_bytes} bytes under codec {codec.name}"
            )
            raise TransferError(message, field="encoded_bytes", request_id=manifest.request_id)
    unknown = sorted(set(pieces) - set(range(layout.layers)))
    if unknown:
        message = f"the manifest has a payload of layer {unknown[0]}; there are {layout.layers}"
        raise TransferError(message, field="layer", request_id=manifest.request_id)
    for layer, length in enumerate(manifest.layer_tokens):
        _check_cover(pieces[layer], layer, min(expected.cached_tokens, length), length)


def _check_raw(manifest: Manifest) -> None:
    if any(payload.layer != RAW_LAYER for payload in manifest.payloads):
        message = "the manifest has KV payloads but no layer_tokens"
        raise TransferError(message, field="layer_tokens", request_id=manifest.request_id)
    end = max((payload.start_token + payload.tokens for payload in manifest.payloads), default=0)
    _check_cover(manifest.payloads, RAW_LAYER, 0, end)


def _check_cover(payloads: Iterable[Payload], layer: int, start: int, end: int) -> None:
    reached = start
    for payload in sorted(payloads, key=lambda piece: piece.start_token):
        if payload.start_token != reached or payload.tokens < 1:
            message = f"layer {layer}: tokens {reached} to {payload.start_token} are missing or sent twice"
            raise TransferError(message, field="payloads")
        reached += payload.tokens
    if reached != end:
        message = f"layer {layer}: payloads reach token {reached}, the manifest says {end}"
        raise TransferError(message, field="payloads")
