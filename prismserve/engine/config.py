"""Settings of one engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prismserve.core.config import FrozenConfig, PositiveInt, PositiveSeconds

_MIB = 1 << 20


class EngineConfig(FrozenConfig):
    """Sizes and bounds of one engine.

    Attributes:
        native_kernels: whether a worker on a CPU uses kernels compiled on its machine, where a C++ compiler is at hand;
            read before the model is loaded.
        block_tokens: tokens per KV block.
        kv_cache_bytes: memory of the KV pool; None sizes it from free memory and what ``max_running`` can use.
        kv_cache_dtype: how keys and values are kept: in the type of the weights (``auto``), in ``bf16``, or as ``fp8``
            (e4m3), ``int8`` or ``int4`` codes with a scale per token and head. Two bytes of scale (``int4``: four) come
            to each head_dim of codes.
        cuda_graphs: whether decode steps on a CUDA device are recorded once per batch size and replayed; off, every
            kernel is launched in every step.
        scheduler: ``stall_free`` bounds the prefill tokens of a step that also decodes; ``exact_fill`` fills every
            step to ``max_step_tokens``.
        max_step_tokens: tokens computed in one step, decodes and prefill chunks together.
        max_mixed_prefill_tokens: prefill tokens in a step that also decodes, under ``stall_free``.
        priority_ageing_s: waiting that one point of a request's priority is worth, in seconds; None never lets a lower
            priority go before a higher one.
        prefix_bonus_s: waiting that a wholly cached prompt is worth when requests are admitted, in seconds (a partly
            cached one in proportion); bounds how long others can be overtaken. 0 admits in order of arrival.
        preemption: ``recompute`` drops the KV of a preempted sequence and computes it again; ``swap`` copies it to
            host memory while there is room, which pays where the copy is cheaper than computing.
        swap_bytes: host memory for swapped KV.
        max_running: sequences that hold KV blocks at one time.
        max_waiting: submitted sequences that do not run yet; one more is refused.
        image_cache_bytes: memory of the image-embedding cache.
        derive_images: an image that is cached under a larger budget of a nested visual method is not encoded again for a
            smaller one.
        prefix_caching: whether full blocks are kept for later requests.
        max_model_len: longest sequence in tokens; None takes the model's own limit.
        max_encode_images: images encoded in one step, so that a request with many does not stall decodes.
        constraint_timeout_s: longest wait for a constraint on an answer (JSON schema, regex, grammar) to be compiled.
        constraint_max_bytes: longest constraint.
        constraint_cache_entries: compiled constraints that are remembered.
    """

    native_kernels: bool = True
    block_tokens: int = Field(default=16, ge=1, le=1024)
    kv_cache_bytes: PositiveInt | None = None
    kv_cache_dtype: Literal["auto", "bf16", "fp8", "int8", "int4"] = "auto"
    cuda_graphs: bool = True
    scheduler: Literal["stall_free", "exact_fill"] = "stall_free"
    max_step_tokens: PositiveInt = 2048
    max_mixed_prefill_tokens: PositiveInt = 512
    priority_ageing_s: float | None = Field(default=30.0, gt=0)
    prefix_bonus_s: float = Field(default=0.5, ge=0)
    preemption: Literal["recompute", "swap"] = "recompute"
    swap_bytes: int = Field(default=1024 * _MIB, ge=0)
    max_running: PositiveInt = 64
    max_waiting: PositiveInt = 256
    derive_images: bool = True
    image_cache_bytes: int = Field(default=256 * _MIB, ge=0)
    prefix_caching: bool = True
    max_model_len: PositiveInt | None = None
    max_encode_images: PositiveInt = 4
    constraint_timeout_s: PositiveSeconds = 10.0
    constraint_max_bytes: PositiveInt = 64 << 10
    constraint_cache_entries: PositiveInt = 64
