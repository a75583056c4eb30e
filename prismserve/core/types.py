"""Core types: frozen, slotted, shared by every package. Sizes are in the field names."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from prismserve.core.hashing import DIGEST_BYTES, canonical_json, digest

BlockKey: TypeAlias = bytes
"""32-byte chained key of a full block of tokens; see :func:`prismserve.core.prompt.block_keys`."""

Scalar: TypeAlias = str | int | float | bool | None


class Role(enum.StrEnum):
    """What a worker does: only prefill, only decode (with local prefill of short suffixes), or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class WorkerState(enum.StrEnum):
    """Life of a worker as the cluster sees it."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


class Tier(enum.IntEnum):
    """Where a worker keeps a block, fastest first. The numbers are part of stored and sent forms."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class FinishReason(enum.StrEnum):
    """Why generation ended; the values are OpenAI's, plus ``error`` and ``abort``."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class ConstraintKind(enum.StrEnum):
    """How a constraint on the answer is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the whole answer must be.

    Attributes:
        kind: how ``text`` is written.
        text: a JSON schema as JSON, a regular expression, a JSON array of strings, or a grammar (Lark, GBNF, EBNF).
    """

    kind: ConstraintKind
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    ``temperature`` 0 is greedy. ``top_k`` 0 is off. ``seed`` None draws one per request at the router, so that
    a migrated request goes on with the same random stream: token i is drawn from (seed, i).

    ``logit_bias`` holds (token id, what is added to its logit), by token id. ``logprobs`` None is off; k asks for the
    log-probability of every chosen token and of the k most likely ones. ``constraint`` None leaves the answer free.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A compression method or codec by name, with its parameters, normalised (sorted, defaults filled in)."""

    name: str
    params: tuple[tuple[str, Scalar], ...] = ()

    def fingerprint(self) -> bytes:
        """32 bytes that name the method and every parameter."""
        return digest("method", self.name.encode(), canonical_json(dict(self.params)))


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """What is done to one request's visual tokens, before the decoder and within it, and to its KV on the wire.

    All are always set; ``none`` is the identity. Visual fingerprints enter the keys of images, prefill fingerprints the
    request's namespace (:func:`prefill_namespace`). Wire codecs do neither: they change bytes in flight, and lossy
    codecs mark what they produce (see ``lossy``).
    """

    visual: MethodSpec = field(default_factory=lambda: MethodSpec("none"))
    wire: MethodSpec = field(default_factory=lambda: MethodSpec("none"))
    preset: str = "custom"
    prefill: MethodSpec = field(default_factory=lambda: MethodSpec("none"))

    @property
    def exact(self) -> bool:
        """Whether outputs are bit-equal to serving without compression."""
        return self.visual.name == self.prefill.name == self.wire.name == "none"


class MediaKind(enum.StrEnum):
    """What a media item is."""

    IMAGE = "image"
    VIDEO = "video"


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """When the frames of a video are shown.

    Attributes:
        seconds: of each frame, from the start of the video; ascending, at least one.
        rate: frames per second of these frames, on average over the whole video.
    """

    seconds: tuple[float, ...]
    rate: float

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return len(self.seconds)

    def packed(self) -> bytes:
        """Bytes that differ wherever the times do."""
        return struct.pack(f"<{self.frames + 1}d", self.rate, *self.seconds)


@dataclass(frozen=True, slots=True)
class MediaInput:
    """One image or video of a request, already validated.

    Attributes:
        data: of an image, the encoded file (PNG, JPEG or WebP). Of a video, the samples of the frames that were
            chosen, uint8 [frames, height, width, 3] in RGB: the container is opened once, where it arrives, and every
            worker sees the same pixels whatever decoder it has.
        pixel_hash: 32 bytes over mode, shape and pixels after decoding; of a video, over its times too.
        width_px: width after decoding.
        height_px: height after decoding.
        times: of a video, when its frames are shown; None for an image.
    """

    data: bytes
    pixel_hash: bytes
    width_px: int
    height_px: int
    times: FrameTimes | None = None

    @property
    def kind(self) -> MediaKind:
        """Image or video."""
        return MediaKind.IMAGE if self.times is None else MediaKind.VIDEO

    @property
    def frames(self) -> int:
        """Frames of a video; 0 for an image."""
        return 0 if self.times is None else self.times.frames


@dataclass(frozen=True, slots=True)
class TextSegment:
    """A run of text tokens in a prompt."""

    token_ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Cache slots it takes."""
        return len(self.token_ids)

    @property
    def raw_tokens(self) -> int:
        """Cache slots it would take without compression."""
        return len(self.token_ids)

    @property
    def positions(self) -> int:
        """Positions it spans."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class MediaSegment:
    """The place of one image or video in a prompt.

    Attributes:
        media_index: which entry of ``Request.media``.
        key: 32 bytes naming the embeddings that fill it: pixel hash, processor, encoder, visual plan.
        tokens: cache slots it takes, after compression.
        raw_tokens: cache slots it would take without compression.
        position_span: how far the position of what follows lies behind its first; None where every raw token has a
            position of its own (survivors keep theirs).
        position_reach: one more than the last of its positions, counted from its first; None where that is the span.
            The time of a long video may reach beyond the position of the text behind it.
    """

    media_index: int
    key: bytes
    tokens: int
    raw_tokens: int
    position_span: int | None = None
    position_reach: int | None = None

    @property
    def positions(self) -> int:
        """Positions it spans."""
        return self.raw_tokens if self.position_span is None else self.position_span

    @property
    def reach(self) -> int:
        """One more than the last of its positions, counted from its first."""
        return self.positions if self.position_reach is None else self.position_reach


Segment: TypeAlias = TextSegment | MediaSegment


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text and media segments in order."""

    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        """Cache slots the prompt takes, after compression."""
        return sum(s.tokens for s in self.segments)

    @property
    def raw_tokens(self) -> int:
        """Cache slots the prompt would take without compression."""
        return sum(s.raw_tokens for s in self.segments)

    @property
    def next_position(self) -> int:
        """Position of the first generated token: one more than the highest of the prompt."""
        following = highest = 0
        for segment in self.segments:
            if isinstance(segment, MediaSegment):
                highest = max(highest, following + segment.reach)
            following += segment.positions
        return max(following, highest)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens after compression."""
        return sum(s.tokens for s in self.segments if isinstance(s, MediaSegment))

    @property
    def visual_tokens_raw(self) -> int:
        """Visual tokens before compression."""
        return sum(s.raw_tokens for s in self.segments if isinstance(s, MediaSegment))

    def media_segments(self) -> Iterator[MediaSegment]:
        """The segments of images and videos in order."""
        return (s for s in self.segments if isinstance(s, MediaSegment))


@dataclass(frozen=True, slots=True)
class Request:
    """One generation, as the router hands it to workers.

    Attributes:
        request_id: unique in the cluster.
        attempt: counts placements of the same request; a later attempt fences an earlier one.
        namespace: 32 bytes: model, KV layout and tenant; the root of the block-key chain.
        wire_namespace: root of the chain for KV that crossed the wire; equals ``namespace`` for exact codecs,
            because KV restored from a lossy codec is not interchangeable with the KV it came from.
        tenant: names who caches what on a worker; "" is the default tenant.
        cache_share: part of a worker's KV blocks that cached prefixes of this tenant may fill while others want room.
        resume_token_ids: tokens already emitted by an earlier attempt, continued and not emitted again.
        scoring_token_ids: the text by which a visual method that asks about the question ranks, see
            ``Processor.scoring_ids``; empty under any other method.
        timeout_s: time left for the whole request when the message was sent, in seconds.
    """

    request_id: str
    attempt: int
    namespace: bytes
    wire_namespace: bytes
    prompt: Prompt
    media: tuple[MediaInput, ...]
    sampling: SamplingParams
    compression: CompressionPlan
    resume_token_ids: tuple[int, ...] = ()
    priority: int = 0
    timeout_s: float = 600.0
    tenant: str = ""
    cache_share: float = 1.0
    scoring_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What makes KV bytes interchangeable between two workers.

    A block holds ``block_tokens`` tokens of one layer: K and V, each [block_tokens, kv_heads, head_dim].

    Attributes:
        dtype: of keys and values as attention and codecs see them.
        kv_format: how they lie in memory: ``plain`` in ``dtype``; ``fp8``, ``int8`` or ``int4`` as codes with a float16
            scale (for int4 also an offset) per token, head and side.
    """

    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    position_scheme: str = "rope"
    kv_format: str = "plain"

    @property
    def quantised(self) -> bool:
        """Whether keys and values lie in memory as codes."""
        return self.kv_format != "plain"

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element of ``dtype``."""
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes in memory of one row: the keys or the values of one token and head."""
        scale_bytes = 2
        return {
            "plain": self.head_dim * self.dtype_bytes,
            "fp8": self.head_dim + scale_bytes,
            "int8": self.head_dim + scale_bytes,
            "int4": self.head_dim // 2 + 2 * scale_bytes,
        }[self.kv_format]

    @property
    def token_layer_bytes(self) -> int:
        """Bytes in memory of K and V of one token in one layer."""
        return 2 * self.kv_heads * self.row_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes in memory of K and V of one token over all layers."""
        return self.layers * self.token_layer_bytes

    def fingerprint(self) -> bytes:
        """32 bytes; equal exactly when blocks may be exchanged."""
        return digest(
            "kv-layout",
            canonical_json(
                [
                    self.dtype,
                    self.layers,
                    self.kv_heads,
                    self.head_dim,
                    self.block_tokens,
                    self.position_scheme,
                    self.kv_format,
                ]
            ),
        )


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as the registry lists it.

    Attributes:
        worker_id: unique name, stable for the life of the process.
        epoch: grows with every registration in the cluster; an older epoch of the same worker is fenced.
        control_address: ``host:port`` of its data-plane gRPC server.
        transports: what can write into its arena, best first.
        endpoint: opaque bytes by which a transport connects (from ``TransportHub.endpoint()``).
    """

    worker_id: str
    role: Role
    epoch: int
    pid: int
    node: str
    control_address: str
    model_fingerprint: bytes
    layout: KVLayout
    transports: tuple[str, ...]
    endpoint: bytes
    state: WorkerState = WorkerState.READY


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """The one stats record every worker reports, for status, routing and autoscaling.

    ``link_bytes_per_s`` are the measured rates of its links, by the worker they lead to.
    """

    worker_id: str = ""
    threads: int = 0
    waiting: int = 0
    running: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    image_queries: int = 0
    image_hits: int = 0
    encoded_images: int = 0
    derived_images: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    transfers: int = 0
    transfer_bytes: int = 0
    transfer_raw_bytes: int = 0
    transfer_seconds: float = 0.0
    transfer_failures: int = 0
    prefill_tokens_per_s: float = 0.0
    step_ms: float = 0.0
    tier_host_bytes_per_s: float = 0.0
    tier_disk_bytes_per_s: float = 0.0
    tier_host_blocks: int = 0
    tier_disk_blocks: int = 0
    tier_restored_images: int = 0
    tier_restored_tokens: int = 0
    tier_corrupt_blocks: int = 0
    tier_errors: int = 0
    link_bytes_per_s: tuple[tuple[str, float], ...] = ()


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


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely one generated token was to the model itself, before bias, penalties, constraint and temperature.

    Attributes:
        logprob: natural logarithm of its probability.
        top: (token id, logprob) of the most likely tokens, best first; as many as the request asked for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """What the prefill side measured for one request, for the usage report.

    ``visual_tokens_by_cut`` are the visual tokens a prefill method left behind each of its cuts; empty without one.
    ``fetch_ms`` is the time before the engine saw the request, in which ``restored_tokens`` came from the worker's own
    tiers and ``pulled_tokens`` from another worker; both are part of ``cached_tokens`` if they were still there.
    """

    worker_id: str = ""
    cached_tokens: int = 0
    computed_tokens: int = 0
    images: int = 0
    images_cached: int = 0
    encode_ms: float = 0.0
    prefill_ms: float = 0.0
    kv_bytes_raw: int = 0
    kv_bytes_kept: int = 0
    kv_bytes_sent: int = 0
    transfer_ms: float = 0.0
    transfer_exposed_ms: float = 0.0
    transport: str = "local"
    visual_tokens_by_cut: tuple[int, ...] = ()
    fetch_ms: float = 0.0
    restored_tokens: int = 0
    pulled_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one engine step produced for one request; ``logprobs`` has an entry per token if they were asked for."""

    request_id: str
    attempt: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str = ""
    report: PrefillReport | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class RoutePrediction:
    """What placement expected of its choice, in seconds; the whole is the time from there to the first token.

    Attributes:
        base_s: beside everything else.
        queue_s: behind other requests.
        fetch_s: restoring and pulling.
        encode_s: encoding images.
        prefill_s: computing the prompt.
        transfer_s: bytes that reach the decode worker after the prefill has ended.
        handoff_s: of a handoff, beside the bytes.
        other_s: the whole of the best choice of the other kind (local or disaggregated); 0 if there was none.
        ways: how each part of the prompt gets to the worker.
        idle: whether the chosen workers had no other request.
    """

    base_s: float = 0.0
    queue_s: float = 0.0
    fetch_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    handoff_s: float = 0.0
    other_s: float = 0.0
    ways: tuple[str, ...] = ()
    idle: bool = False

    @property
    def total_s(self) -> float:
        """The whole."""
        parts = (self.queue_s, self.fetch_s, self.encode_s, self.prefill_s, self.transfer_s, self.handoff_s)
        return self.base_s + sum(parts)


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Where a request goes, and why.

    ``prefill_worker`` None means the decode worker prefills locally. ``pull_from`` names a worker that holds
    ``pull_blocks`` leading blocks the prefill worker lacks. ``embedding_holders`` gives, per image, a worker that
    holds its embeddings, or "". ``restore`` False tells it not to read its own tiers, because something else is faster.
    ``compress_harder`` sends the KV under the codec the request allows for that.
    """

    decode_worker: str
    prefill_worker: str | None
    reason: str
    pull_from: str | None = None
    pull_blocks: int = 0
    embedding_holders: tuple[str, ...] = ()
    restore: bool = True
    compress_harder: bool = False
    prediction: RoutePrediction | None = None


def namespace(model_fingerprint: bytes, layout: KVLayout, tenant_salt: bytes) -> bytes:
    """The root of a request's block-key chain: model, KV layout and tenant."""
    if len(model_fingerprint) != DIGEST_BYTES:
        message = f"model_fingerprint must be {DIGEST_BYTES} bytes, got {len(model_fingerprint)}"
        raise ValueError(message)
    return digest("namespace", model_fingerprint, layout.fingerprint(), tenant_salt)


def prefill_namespace(root: bytes, method: MethodSpec) -> bytes:
    """The chain root of requests whose visual tokens a prefill method reduces inside the decoder.

    What such a request leaves in a cache is found by requests of the same plan only, whatever share code the method has.
    """
    return root if method.name == "none" else digest("namespace-prune", root, method.fingerprint())


def wire_namespace(root: bytes, codec: MethodSpec, *, lossy: bool) -> bytes:
    """The chain root for KV that crossed the wire under ``codec``."""
    return digest("namespace-wire", root, codec.fingerprint()) if lossy else root
