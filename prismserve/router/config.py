"""Limits and timing of the front doors, and the weights of placement."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prismserve.core.config import FrozenConfig, NonNegativeInt, PositiveInt, PositiveSeconds


class RouterConfig(FrozenConfig):
    """What the front doors accept, and how the router places and follows requests."""

    max_images: PositiveInt = Field(default=16, description="Images per request (count).")
    max_image_pixels: PositiveInt = Field(default=16_777_216, description="Width times height of one image (pixels).")
    max_image_side_px: PositiveInt = Field(default=16_384, description="Longest side of an image (pixels).")
    min_image_side_px: PositiveInt = Field(default=2, description="Shortest side of an image (pixels).")
    max_image_aspect_ratio: PositiveInt = Field(default=100, description="Longest side over shortest side (ratio).")
    max_videos: PositiveInt = Field(default=4, description="Videos per request (count).")
    max_video_file_bytes: PositiveInt = Field(default=32 << 20, description="One MP4 or WebM file (bytes).")
    max_video_frames: PositiveInt = Field(default=64, description="Frames taken of one video (count).")
    max_video_source_frames: PositiveInt = Field(default=18_000, description="Frames in one video file (count).")
    max_video_bytes: PositiveInt = Field(
        default=64 << 20, description="Samples of all videos of a request; frames are scaled down to fit (bytes)."
    )
    video_frame_pixels: PositiveInt = Field(
        default=602_112, description="Frames with more are scaled down to this: width times height (pixels)."
    )
    video_fps: float = Field(
        default=2.0, gt=0, le=240, allow_inf_nan=False, description="Frames taken where a request says nothing (1/s)."
    )
    video_timeout_s: PositiveSeconds = Field(default=20.0, description="Decoding of one video (seconds).")
    video_cache_bytes: NonNegativeInt = Field(
        default=128 << 20, description="Samples of videos kept for the next question about them (bytes)."
    )
    max_pending_video_bytes: PositiveInt = Field(
        default=1 << 30, description="Samples of the videos of all requests in progress (bytes)."
    )
    max_body_bytes: PositiveInt = Field(default=64 << 20, description="One HTTP body or gRPC message (bytes).")
    max_pending_body_bytes: PositiveInt = Field(
        default=512 << 20, description="All HTTP bodies being read or prepared at one moment (bytes)."
    )
    max_messages: PositiveInt = Field(default=1024, description="Chat messages per request (count).")
    max_prompt_chars: PositiveInt = Field(default=2_000_000, description="Text of one request (characters).")
    max_stop_strings: PositiveInt = Field(default=16, description="Stop strings per request (count).")
    max_stop_chars: PositiveInt = Field(default=256, description="Length of one stop string (characters).")
    max_constraint_chars: PositiveInt = Field(
        default=1 << 16, description="A JSON schema, regular expression, list of choices or grammar (characters)."
    )
    max_choices: PositiveInt = Field(default=16, description="Answers per request, `n` (count).")
    max_cache_salt_chars: PositiveInt = Field(default=256, description="Length of `cache_salt` (characters).")
    max_concurrent_requests: PositiveInt = Field(
        default=256, description="Requests in progress in this router; more are answered 429 (count)."
    )
    max_connections: PositiveInt = Field(default=2048, description="HTTP connections of this router (count).")
    max_attempts: PositiveInt = Field(default=4, description="Placements of one request, the first included (count).")
    retry_after_s: PositiveSeconds = Field(default=1.0, description="`Retry-After` of a 429 (seconds).")
    request_timeout_s: PositiveSeconds = Field(default=600.0, description="Longest life of a request (seconds).")
    header_timeout_s: PositiveSeconds = Field(default=10.0, description="Until all headers have arrived (seconds).")
    body_timeout_s: PositiveSeconds = Field(default=60.0, description="Until the whole body has arrived (seconds).")
    body_idle_timeout_s: PositiveSeconds = Field(default=10.0, description="Between two parts of a body (seconds).")
    keep_alive_s: PositiveInt = Field(default=30, description="An idle HTTP connection is closed after this (seconds).")
    stop_timeout_s: PositiveSeconds = Field(default=5.0, description="For open responses when stopping (seconds).")
    replace_wait_s: PositiveSeconds = Field(
        default=20.0, description="How long a request that lost its worker waits for another one (seconds)."
    )
    reconcile_interval_s: PositiveSeconds = Field(
        default=0.2, description="Between two looks at the registry of workers (seconds)."
    )
    connect_timeout_s: PositiveSeconds = Field(
        default=5.0, description="Until a worker has answered a new session (seconds)."
    )
    reconnect_backoff_s: PositiveSeconds = Field(default=0.2, description="Before the first reconnection (seconds).")
    reconnect_backoff_max_s: PositiveSeconds = Field(default=5.0, description="Between reconnections (seconds).")
    worker_silence_s: PositiveSeconds = Field(
        default=15.0, description="A worker that sends nothing for this long, statistics included, is lost (seconds)."
    )
    unregistered_silence_s: PositiveSeconds = Field(
        default=3.0, description="The same for a worker that has left the registry (seconds)."
    )
    max_session_queue: PositiveInt = Field(default=1024, description="Messages waiting to be sent to a worker (count).")
    media_threads: PositiveInt = Field(default=2, description="Threads that check and hash images (count).")
    image_hash_entries: PositiveInt = Field(default=4096, description="Images whose pixel hash is remembered (count).")
    measured_costs: bool = Field(
        default=True,
        description="Placement predicts times from what was measured of workers, links and tiers; off: it assumes the"
        " same fixed speeds of all.",
    )
    local_prefill: Literal["short", "cost"] = Field(
        default="short",
        description="When a decode worker prefills by itself although there are prefill workers: `short`: when at most"
        " `local_prefill_tokens_max` tokens are missing; `cost`: also when that is predicted to be faster.",
    )
    stall_cost: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Under `local_prefill: cost`, what one second counts by which a prefill delays one answer being"
        " written (seconds).",
    )
    harder_codec: Literal["none", "fp8", "int8", "int4"] = Field(
        default="none",
        description="Wire codec for requests that give no `compression` of their own, used where sending their KV as"
        " it is is predicted to delay the first token; `none`: never.",
    )
    harder_gain_min: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Part of the predicted time to the first token that `harder_codec` must spare to be used (ratio).",
    )
    local_prefill_tokens_max: NonNegativeInt = Field(
        default=32, description="Uncached tokens up to which a decode worker prefills by itself (tokens)."
    )
    pull_blocks_min: PositiveInt = Field(
        default=2, description="Cached blocks another worker must hold beyond ours before they are pulled (blocks)."
    )
    load_cost_tokens: NonNegativeInt = Field(
        default=256, description="What one queued or running request costs in placement (prefill tokens)."
    )
    image_cost_tokens: NonNegativeInt = Field(
        default=512, description="What encoding one image costs in placement (prefill tokens)."
    )
    kv_pressure: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of KV blocks referenced by requests above which a decode worker is avoided (ratio).",
    )
    default_temperature: float = Field(
        default=1.0, ge=0, le=2, allow_inf_nan=False, description="Temperature of requests that give none (ratio)."
    )
