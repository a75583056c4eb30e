"""Settings of one engine."""

from __future__ import annotations

from pydantic import Field

from prismserve.core.config import FrozenConfig, PositiveInt, PositiveSeconds

_MIB = 1 << 20


class EngineConfig(FrozenConfig):
    """Sizes and bounds of one engine.

    Attributes:
        block_tokens: tokens per KV block.
        kv_cache_bytes: memory of the KV pool; None sizes it from free memory and what ``max_running`` can use.
        max_step_tokens: tokens computed in one step, decodes and prefill chunks together.
        max_running: sequences that hold KV blocks at one time.
        max_waiting: submitted sequences that do not run yet; one more is refused.
        image_cache_bytes: memory of the image-embedding cache.
        prefix_caching: whether full blocks are kept for later requests.
        max_model_len: longest sequence in tokens; None takes the model's own limit.
        max_encode_images: images encoded in one step, so that a request with many does not stall decodes.
        constraint_timeout_s: longest wait for a constraint on an answer (JSON schema, regex, grammar) to be compiled.
        constraint_max_bytes: longest constraint.
        constraint_cache_entries: compiled constraints that are remembered.
    """

    block_tokens: int = Field(default=16, ge=1, le=1024)
    kv_cache_bytes: PositiveInt | None = None
    max_step_tokens: PositiveInt = 2048
    max_running: PositiveInt = 64
    max_waiting: PositiveInt = 256
    image_cache_bytes: int = Field(default=256 * _MIB, ge=0)
    prefix_caching: bool = True
    max_model_len: PositiveInt | None = None
    max_encode_images: PositiveInt = 4
    constraint_timeout_s: PositiveSeconds = 10.0
    constraint_max_bytes: PositiveInt = 64 << 10
    constraint_cache_entries: PositiveInt = 64
