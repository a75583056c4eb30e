"""Core types: frozen, slotted, shared by every package. Sizes are in the field names."""

from __future__ import annotations

from prismserve.core.types.compression import CompressionPlan, MethodSpec
from prismserve.core.types.layout import KVLayout, namespace, prefill_namespace, wire_namespace
from prismserve.core.types.names import BlockKey, FinishReason, Role, Scalar, Tier, WorkerState
from prismserve.core.types.output import PrefillReport, TokenLogprobs, TokenOutput
from prismserve.core.types.prompt import (
    FrameTimes,
    MediaInput,
    MediaKind,
    MediaSegment,
    Prompt,
    Request,
    Segment,
    TextSegment,
)
from prismserve.core.types.routing import RouteDecision, RoutePrediction
from prismserve.core.types.sampling import Constraint, ConstraintKind, SamplingParams
from prismserve.core.types.transfer import MANIFEST_VERSION, Extent, Manifest, Payload, Reservation
from prismserve.core.types.worker import WorkerInfo, WorkerStats

__all__ = [
    "MANIFEST_VERSION",
    "BlockKey",
    "CompressionPlan",
    "Constraint",
    "ConstraintKind",
    "Extent",
    "FinishReason",
    "FrameTimes",
    "KVLayout",
    "Manifest",
    "MediaInput",
    "MediaKind",
    "MediaSegment",
    "MethodSpec",
    "Payload",
    "PrefillReport",
    "Prompt",
    "Request",
    "Reservation",
    "Role",
    "RouteDecision",
    "RoutePrediction",
    "SamplingParams",
    "Scalar",
    "Segment",
    "TextSegment",
    "Tier",
    "TokenLogprobs",
    "TokenOutput",
    "WorkerInfo",
    "WorkerState",
    "WorkerStats",
    "namespace",
    "prefill_namespace",
    "wire_namespace",
]
