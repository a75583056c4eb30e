"""What workers report: tokens and how the prefill went."""

from __future__ import annotations

from dataclasses import dataclass

from prismserve.core.types.names import FinishReason


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely one generated token was to the model itself, before bias, penalties, constraint and temperature.

    Attributes:
        logprob: natural logarithm of its probability.
        top: (token id, logprob) of the most likely tokens, best first; as many as the request asked for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
