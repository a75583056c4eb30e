"""What a request consists of: text and media segments, prompt, request."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from prismserve.core.types.compression import CompressionPlan
from prismserve.core.types.sampling import SamplingParams


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
