"""What a finished request reports about itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prismserve.core.hashing import canonical_json
from prismserve.core.types import MediaKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.core.types import CompressionPlan, PrefillReport, RouteDecision
    from prismserve.router.requests import Prepared


@dataclass(frozen=True, slots=True)
class Usage:
    """The usage report of one request; OpenAI's counts and ours.

    Attributes:
        prompt_tokens: cache slots of the prompt, after visual compression; a prefill method does not change them.
        visual_tokens_after: visual tokens that are left, in the last layer where layers differ.
        visual_tokens_by_cut: visual tokens that a prefill method left behind each of its cuts; empty without one.
        cached_tokens: of those, how many were not prefilled again.
        images_cached: images and videos that were not encoded again.
        frames: frames of all videos, as the model saw them.
        kv_bytes_before: KV of the prompt without any compression, in bytes.
        kv_bytes_after: KV that was kept, in bytes of the resident type.
        kv_bytes_sent: KV that crossed between workers, as encoded.
        queue_ms: part of ``ttft_ms`` that was neither encoding, prefill nor exposed transfer.
        attempts: placements it took; 1 when no worker was lost.
        preset_asked: the preset in whose place ``compression`` was served; empty where none was stepped back.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    visual_tokens_before: int
    visual_tokens_after: int
    kv_bytes_before: int
    kv_bytes_after: int
    kv_bytes_sent: int
    transport: str
    ttft_ms: float
    queue_ms: float
    encode_ms: float
    prefill_ms: float
    transfer_ms: float
    transfer_exposed_ms: float
    images: int
    images_cached: int
    videos: int
    frames: int
    prefill_worker: str
    decode_worker: str
    route_reason: str
    compression: CompressionPlan
    attempts: int
    visual_tokens_by_cut: tuple[int, ...] = ()
    preset_asked: str = ""

    def openai(self) -> dict[str, Any]:
        """The ``usage`` object of OpenAI's API with the block ``prismserve``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "prismserve": {
                "visual_tokens_before": self.visual_tokens_before,
                "visual_tokens_after": self.visual_tokens_after,
                "visual_tokens_by_cut": list(self.visual_tokens_by_cut),
                "kv_bytes_before": self.kv_bytes_before,
                "kv_bytes_after": self.kv_bytes_after,
                "kv_bytes_sent": self.kv_bytes_sent,
                "transport": self.transport,
                "ttft_ms": round(self.ttft_ms, 3),
                "queue_ms": round(self.queue_ms, 3),
                "encode_ms": round(self.encode_ms, 3),
                "prefill_ms": round(self.prefill_ms, 3),
                "transfer_ms": round(self.transfer_ms, 3),
                "transfer_exposed_ms": round(self.transfer_exposed_ms, 3),
                "images": self.images,
                "images_cached": self.images_cached,
                "videos": self.videos,
                "frames": self.frames,
                "prefill_worker": self.prefill_worker,
                "decode_worker": self.decode_worker,
                "route_reason": self.route_reason,
                "attempts": self.attempts,
                "compression": plan_json(self.compression, self.preset_asked),
            },
        }


def plan_json(plan: CompressionPlan, preset_asked: str = "") -> dict[str, Any]:
    """A resolved plan as the API shows it: parameters without the method's version.

    ``preset_asked`` is the preset that was asked for, where a milder one is served in its place.
    """
    visual = {name: value for name, value in plan.visual.params if name != "version"}
    prefill = {name: value for name, value in plan.prefill.params if name != "version"}
    wire = {name: value for name, value in plan.wire.params if name != "version"}
    return {
        "preset": plan.preset,
        "visual": {"method": plan.visual.name, **visual},
        "prefill": {"method": plan.prefill.name, **prefill},
        "wire": {"codec": plan.wire.name, **wire},
        **({"stepped_back_from": preset_asked} if preset_asked else {}),
    }


def plan_text(plan: CompressionPlan, preset_asked: str = "") -> str:
    """The same as canonical JSON, for gRPC."""
    return canonical_json(plan_json(plan, preset_asked)).decode()


@dataclass(frozen=True, slots=True)
class Served:
    """Who served a request and what they measured.

    Attributes:
        first: of the attempt that gave the first token.
        last: of the attempt that gave the last one.
        report: of the attempt that gave the first token; None if the worker sent none.
        ttft_s: from arrival at the router to the first token there, in seconds.
    """

    first: RouteDecision
    last: RouteDecision
    report: PrefillReport | None
    ttft_s: float
    completion_tokens: int
    attempts: int


def combine(usages: Sequence[Usage]) -> Usage:
    """The report of several answers to one prompt: the prompt's part is the first one's, answers and bytes add up."""
    return dataclasses.replace(
        usages[0],
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        kv_bytes_sent=sum(usage.kv_bytes_sent for usage in usages),
        attempts=max(usage.attempts for usage in usages),
    )


def make_usage(prepared: Prepared, served: Served, token_bytes: int) -> Usage:
    """Compose the report of a finished request; ``token_bytes`` is the KV of one token over all layers."""
    prompt, media = prepared.request.prompt, prepared.request.media
    report = served.report
    ttft_ms = served.ttft_s * 1e3
    by_cut = report.visual_tokens_by_cut if report else ()
    busy_ms = report.encode_ms + report.prefill_ms + report.transfer_exposed_ms if report else 0.0
    return Usage(
        prompt_tokens=prompt.tokens,
        completion_tokens=served.completion_tokens,
        cached_tokens=min(report.cached_tokens, prompt.tokens) if report else 0,
        visual_tokens_before=prompt.visual_tokens_raw,
        visual_tokens_after=by_cut[-1] if by_cut else prompt.visual_tokens,
        kv_bytes_before=prompt.raw_tokens * token_bytes,
        kv_bytes_after=report.kv_bytes_kept if report and report.kv_bytes_kept else prompt.tokens * token_bytes,
        kv_bytes_sent=report.kv_bytes_sent if report else 0,
        transport=report.transport if report else "local",
        ttft_ms=ttft_ms,
        queue_ms=max(0.0, ttft_ms - busy_ms),
        encode_ms=report.encode_ms if report else 0.0,
        prefill_ms=report.prefill_ms if report else 0.0,
        transfer_ms=report.transfer_ms if report else 0.0,
        transfer_exposed_ms=report.transfer_exposed_ms if report else 0.0,
        images=sum(item.kind is MediaKind.IMAGE for item in media),
        videos=sum(item.kind is MediaKind.VIDEO for item in media),
        frames=sum(item.frames for item in media),
        images_cached=report.images_cached if report else 0,
        prefill_worker=served.first.prefill_worker or served.first.decode_worker,
        decode_worker=served.last.decode_worker,
        route_reason=served.first.reason,
        compression=prepared.request.compression,
        attempts=served.attempts,
        visual_tokens_by_cut=by_cut,
        preset_asked=prepared.preset_asked,
    )
