"""Core types to protobuf messages and back. Malformed messages raise TransferError, never anything else."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from prismserve.core.errors import TransferError
from prismserve.core.hashing import DIGEST_BYTES
from prismserve.core.types import (
    CompressionPlan,
    Constraint,
    ConstraintKind,
    Extent,
    FinishReason,
    FrameTimes,
    Manifest,
    MediaInput,
    MediaSegment,
    MethodSpec,
    Payload,
    PrefillReport,
    Prompt,
    Request,
    Reservation,
    SamplingParams,
    Segment,
    TextSegment,
    TokenLogprobs,
    TokenOutput,
    WorkerStats,
)
from prismserve.protocol import worker_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prismserve.core.types import Scalar

CHECKSUM_BYTES = 16


def _digest(value: bytes, name: str) -> bytes:
    if len(value) != DIGEST_BYTES:
        message = f"{name} must be {DIGEST_BYTES} bytes, got {len(value)}"
        raise TransferError(message, field=name)
    return value


def split_keys(joined: bytes) -> tuple[bytes, ...]:
    """Cut concatenated 32-byte keys apart."""
    if len(joined) % DIGEST_BYTES:
        message = f"block_keys must be a multiple of {DIGEST_BYTES} bytes, got {len(joined)}"
        raise TransferError(message, field="block_keys")
    return tuple(joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES))


def join_keys(keys: Iterable[bytes]) -> bytes:
    """Concatenate 32-byte keys."""
    return b"".join(keys)


# ---- methods ---------------------------------------------------------------------------------------------------


def _scalar_to_proto(value: Scalar) -> pb.Scalar:
    if isinstance(value, bool):
        return pb.Scalar(flag=value)
    if isinstance(value, int):
        return pb.Scalar(integer=value)
    if isinstance(value, float):
        return pb.Scalar(number=value)
    if value is None:
        return pb.Scalar()
    return pb.Scalar(text=value)


def _scalar_from_proto(value: pb.Scalar) -> Scalar:
    match value.WhichOneof("value"):
        case "text":
            return value.text
        case "integer":
            return value.integer
        case "number":
            return value.number
        case "flag":
            return value.flag
        case _:
            return None


def method_to_proto(spec: MethodSpec) -> pb.MethodSpec:
    """A method and its parameters."""
    return pb.MethodSpec(name=spec.name, params={name: _scalar_to_proto(value) for name, value in spec.params})


def method_from_proto(message: pb.MethodSpec) -> MethodSpec:
    """A method and its parameters, sorted by name as MethodSpec wants."""
    return MethodSpec(
        message.name, tuple(sorted((name, _scalar_from_proto(value)) for name, value in message.params.items()))
    )


# ---- requests --------------------------------------------------------------------------------------------------


def _segment_to_proto(segment: Segment) -> pb.Segment:
    if isinstance(segment, TextSegment):
        return pb.Segment(token_ids=segment.token_ids)
    return pb.Segment(
        is_media=True,
        media_index=segment.media_index,
        key=segment.key,
        tokens=segment.tokens,
        raw_tokens=segment.raw_tokens,
        position_span=segment.position_span,
        position_reach=segment.position_reach,
    )


def _segment_from_proto(message: pb.Segment) -> Segment:
    if message.is_media:
        return MediaSegment(
            message.media_index,
            _digest(message.key, "segment.key"),
            message.tokens,
            message.raw_tokens,
            message.position_span if message.HasField("position_span") else None,
            message.position_reach if message.HasField("position_reach") else None,
        )
    return TextSegment(tuple(message.token_ids))


def sampling_to_proto(sampling: SamplingParams) -> pb.SamplingParams:
    """Field by field; names are the same."""
    values = dataclasses.asdict(sampling)
    values["logit_bias"] = dict(sampling.logit_bias)
    return pb.SamplingParams(**values)


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """Field by field; names are the same. An unknown kind of constraint is a TransferError."""
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(SamplingParams)}
    values["stop"] = tuple(message.stop)
    values["stop_token_ids"] = tuple(message.stop_token_ids)
    values["logit_bias"] = tuple(sorted(message.logit_bias.items()))
    values["logprobs"] = message.logprobs if message.HasField("logprobs") else None
    values["constraint"] = _constraint_from_proto(message.constraint) if message.HasField("constraint") else None
    return SamplingParams(**values)


def _constraint_from_proto(message: pb.Constraint) -> Constraint:
    try:
        return Constraint(ConstraintKind(message.kind), message.text)
    except ValueError:
        text = f"unknown kind of constraint {message.kind!r}; upgrade the worker"
        raise TransferError(text, field="constraint.kind") from None


def _media_to_proto(media: MediaInput) -> pb.MediaInput:
    times = None if media.times is None else pb.FrameTimes(seconds=media.times.seconds, rate=media.times.rate)
    return pb.MediaInput(
        data=media.data, pixel_hash=media.pixel_hash, width_px=media.width_px, height_px=media.height_px, times=times
    )


def _media_from_proto(message: pb.MediaInput) -> MediaInput:
    times = FrameTimes(tuple(message.times.seconds), message.times.rate) if message.HasField("times") else None
    item = MediaInput(
        message.data, _digest(message.pixel_hash, "media.pixel_hash"), message.width_px, message.height_px, times
    )
    samples = item.frames * item.height_px * item.width_px * 3
    if times is not None and (not item.frames or len(item.data) != samples):
        text = f"a video of {item.frames} frames takes {samples} bytes, got {len(item.data)}"
        raise TransferError(text, field="media.data")
    return item


def request_to_proto(request: Request) -> pb.Request:
    """The whole request, images and videos included."""
    return pb.Request(
        request_id=request.request_id,
        attempt=request.attempt,
        namespace=request.namespace,
        wire_namespace=request.wire_namespace,
        segments=[_segment_to_proto(s) for s in request.prompt.segments],
        media=[_media_to_proto(item) for item in request.media],
        sampling=sampling_to_proto(request.sampling),
        compression=pb.CompressionPlan(
            visual=method_to_proto(request.compression.visual),
            wire=method_to_proto(request.compression.wire),
            preset=request.compression.preset,
            prefill=method_to_proto(request.compression.prefill),
        ),
        resume_token_ids=request.resume_token_ids,
        priority=request.priority,
        timeout_s=request.timeout_s,
        tenant=request.tenant,
        cache_share=request.cache_share,
        scoring_token_ids=request.scoring_token_ids,
    )


def request_from_proto(message: pb.Request) -> Request:
    """The whole request; digests are checked for length, media references for range."""
    segments = tuple(_segment_from_proto(s) for s in message.segments)
    media = tuple(_media_from_proto(item) for item in message.media)
    for segment in segments:
        if isinstance(segment, MediaSegment) and segment.media_index >= len(media):
            text = f"segment refers to media {segment.media_index} of {len(media)}"
            raise TransferError(text, field="segments.media_index", request_id=message.request_id)
    return Request(
        request_id=message.request_id,
        attempt=message.attempt,
        namespace=_digest(message.namespace, "namespace"),
        wire_namespace=_digest(message.wire_namespace, "wire_namespace"),
        prompt=Prompt(segments),
        media=media,
        sampling=sampling_from_proto(message.sampling),
        compression=CompressionPlan(
            method_from_proto(message.compression.visual),
            method_from_proto(message.compression.wire),
            message.compression.preset,
            method_from_proto(message.compression.prefill),
        ),
        resume_token_ids=tuple(message.resume_token_ids),
        priority=message.priority,
        timeout_s=message.timeout_s,
        tenant=message.tenant,
        cache_share=message.cache_share,
        scoring_token_ids=tuple(message.scoring_token_ids),
    )


# ---- outputs and stats -----------------------------------------------------------------------------------------


def report_to_proto(report: PrefillReport) -> pb.PrefillReport:
    """Field by field; names are the same."""
    return pb.PrefillReport(**dataclasses.asdict(report))


def report_from_proto(message: pb.PrefillReport) -> PrefillReport:
    """Field by field; names are the same."""
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(PrefillReport)}
    values["visual_tokens_by_cut"] = tuple(message.visual_tokens_by_cut)
    return PrefillReport(**values)


def logprobs_to_proto(logprobs: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    """Log-probabilities of tokens, as 32-bit floats."""
    return [
        pb.TokenLogprobs(
            logprob=item.logprob,
            top_token_ids=[token for token, _ in item.top],
            top_logprobs=[value for _, value in item.top],
        )
        for item in logprobs
    ]


def logprobs_from_proto(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of tokens; unequal lengths are a TransferError."""
    out = []
    for m in messages:
        if len(m.top_token_ids) != len(m.top_logprobs):
            text = f"{len(m.top_token_ids)} tokens come with {len(m.top_logprobs)} log-probabilities"
            raise TransferError(text, field="logprobs")
        out.append(TokenLogprobs(m.logprob, tuple(zip(m.top_token_ids, m.top_logprobs, strict=True))))
    return tuple(out)


def token_output_to_proto(output: TokenOutput) -> pb.TokenOutput:
    """One request's part of a step."""
    return pb.TokenOutput(
        request_id=output.request_id,
        attempt=output.attempt,
        token_ids=output.token_ids,
        finish_reason=output.finish_reason.value if output.finish_reason else "",
        error=output.error,
        report=report_to_proto(output.report) if output.report else None,
        logprobs=logprobs_to_proto(output.logprobs),
    )


def token_output_from_proto(message: pb.TokenOutput) -> TokenOutput:
    """One request's part of a step; an unknown finish reason is a TransferError."""
    reason: FinishReason | None = None
    if message.finish_reason:
        try:
            reason = FinishReason(message.finish_reason)
        except ValueError:
            text = f"unknown finish_reason {message.finish_reason!r}"
            raise TransferError(text, field="finish_reason", request_id=message.request_id) from None
    return TokenOutput(
        message.request_id,
        message.attempt,
        tuple(message.token_ids),
        reason,
        message.error,
        report_from_proto(message.report) if message.HasField("report") else None,
        logprobs_from_proto(message.logprobs),
    )


def stats_to_proto(stats: WorkerStats, state: str) -> pb.Stats:
    """Numbers by name, so that a newer worker can report more."""
    values = dataclasses.asdict(stats)
    values.pop("worker_id")
    values.pop("link_bytes_per_s")
    numbers = {name: float(value) for name, value in values.items()}
    return pb.Stats(values=numbers, state=state, link_bytes_per_s=dict(stats.link_bytes_per_s))


def stats_from_proto(worker_id: str, message: pb.Stats) -> WorkerStats:
    """Known numbers by name; unknown ones are left out."""
    values: dict[str, float | int] = {}
    for f in dataclasses.fields(WorkerStats):
        if f.name in message.values:
            number = message.values[f.name]
            values[f.name] = int(number) if f.type == "int" else number
    links = tuple(sorted(message.link_bytes_per_s.items()))
    return dataclasses.replace(WorkerStats(worker_id=worker_id, link_bytes_per_s=links), **values)  # type: ignore[arg-type]


# ---- transfer --------------------------------------------------------------------------------------------------


def extent_to_proto(extent: Extent) -> pb.Extent:
    """Pages and their generation."""
    return pb.Extent(first_page=extent.first_page, pages=extent.pages, generation=extent.generation)


def extent_from_proto(message: pb.Extent) -> Extent:
    """Pages and their generation."""
    return Extent(message.first_page, message.pages, message.generation)


def reservation_to_proto(reservation: Reservation) -> pb.ReserveReply:
    """A granted reservation."""
    return pb.ReserveReply(
        granted=True,
        lease_id=reservation.lease_id,
        extent=extent_to_proto(reservation.extent),
        page_bytes=reservation.page_bytes,
        cached_tokens=reservation.cached_tokens,
        ttl_s=reservation.ttl_s,
    )


def reservation_from_proto(message: pb.ReserveReply) -> Reservation:
    """A granted reservation; the caller has looked at ``granted``."""
    return Reservation(
        message.lease_id,
        extent_from_proto(message.extent),
        message.page_bytes,
        message.cached_tokens,
        message.ttl_s,
    )


def payloads_to_proto(payloads: Sequence[Payload]) -> list[pb.Payload]:
    """Payload descriptions."""
    return [
        pb.Payload(
            layer=p.layer,
            start_token=p.start_token,
            tokens=p.tokens,
            offset_bytes=p.offset_bytes,
            encoded_bytes=p.encoded_bytes,
            checksum=p.checksum,
            codec=p.codec,
        )
        for p in payloads
    ]


def payloads_from_proto(messages: Iterable[pb.Payload]) -> tuple[Payload, ...]:
    """Payload descriptions; checksums are checked for length."""
    out = []
    for m in messages:
        if len(m.checksum) != CHECKSUM_BYTES:
            text = f"payload checksum must be {CHECKSUM_BYTES} bytes, got {len(m.checksum)}"
            raise TransferError(text, field="payloads.checksum")
        out.append(Payload(m.layer, m.start_token, m.tokens, m.offset_bytes, m.encoded_bytes, m.checksum, m.codec))
    return tuple(out)


def manifest_to_proto(manifest: Manifest) -> pb.Manifest:
    """The statement of what was written."""
    return pb.Manifest(
        version=manifest.version,
        request_id=manifest.request_id,
        attempt=manifest.attempt,
        source_worker=manifest.source_worker,
        source_epoch=manifest.source_epoch,
        namespace=manifest.namespace,
        layout_fingerprint=manifest.layout_fingerprint,
        codec=method_to_proto(manifest.codec),
        layer_tokens=manifest.layer_tokens,
        next_position=manifest.next_position,
        first_token_ids=manifest.first_token_ids,
        payloads=payloads_to_proto(manifest.payloads),
        raw_bytes=manifest.raw_bytes,
        first_logprobs=logprobs_to_proto(manifest.first_logprobs),
    )


def manifest_from_proto(message: pb.Manifest) -> Manifest:
    """The statement of what was written."""
    return Manifest(
        request_id=message.request_id,
        attempt=message.attempt,
        source_worker=message.source_worker,
        source_epoch=message.source_epoch,
        namespace=_digest(message.namespace, "manifest.namespace"),
        layout_fingerprint=_digest(message.layout_fingerprint, "manifest.layout_fingerprint"),
        codec=method_from_proto(message.codec),
        layer_tokens=tuple(message.layer_tokens),
        next_position=message.next_position,
        first_token_ids=tuple(message.first_token_ids),
        payloads=payloads_from_proto(message.payloads),
        raw_bytes=message.raw_bytes,
        version=message.version,
        first_logprobs=logprobs_from_proto(message.first_logprobs),
    )
