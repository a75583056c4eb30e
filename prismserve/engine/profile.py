"""What a step needs beside weights and KV, measured before the pool is made."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from prismserve.engine.attention import PagedAttention
from prismserve.engine.pool import KVPool

if TYPE_CHECKING:
    from prismserve.core.types import KVLayout
    from prismserve.models.base import VisionLanguageModel

_log = logging.getLogger(__name__)


def profile_bytes(model: VisionLanguageModel, layout: KVLayout, step_tokens: int) -> int:
    """Peak working memory of one step of ``step_tokens`` tokens, in bytes.

    On an accelerator a step is run over a small pool of its own and the allocator's peak is read, which also compiles
    and loads what the first request would otherwise wait for. On a CPU it is worked out from the sizes of the decoder:
    a full step there can take many seconds, and its peak is lost in that of the process.
    """
    if model.device.type != "cuda":
        return estimate_bytes(model, step_tokens)
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    warm_up(model, layout, step_tokens)
    torch.cuda.synchronize(model.device)
    pool_bytes = -(-(step_tokens + 1) // layout.block_tokens) * layout.block_tokens * layout.token_bytes
    needed = max(0, torch.cuda.max_memory_allocated(model.device) - before - pool_bytes)
    torch.cuda.empty_cache()
    _log.info("a step of %d tokens takes %.1f MiB beside weights and KV", step_tokens, needed / (1 << 20))
    return needed


def warm_up(model: VisionLanguageModel, layout: KVLayout, tokens: int) -> None:
    """Compute a prompt of ``tokens`` tokens and one token more, over blocks that are given back at once."""
    groups = -(-(tokens + 1) // layout.block_tokens)
    pool = KVPool(layout, groups, model.device)
    with torch.inference_mode():
        for start, count in ((0, tokens), (tokens, 1)):
            _step(model, pool, start, count)


def estimate_bytes(model: VisionLanguageModel, step_tokens: int) -> int:
    """Working memory of one step, from the sizes of a decoder layer."""
    config = model.decoder.config
    heads = (config.heads + 2 * config.kv_heads) * config.head_dim
    # Residual, its normed copy and the sum; q, k, v before and after RoPE; gate and up, and their product.
    per_token = 3 * config.hidden_size + 2 * heads + 3 * config.intermediate_size
    element = torch.finfo(model.dtype).bits // 8
    return step_tokens * per_token * element


def _step(model: VisionLanguageModel, pool: KVPool, start: int, count: int) -> None:
    decoder = model.decoder
    table = list(range(pool.groups))
    positions = torch.arange(start, start + count, device=model.device)
    attention = PagedAttention(pool, [table], [start], [count], positions)
    x = decoder.embed(torch.zeros(count, dtype=torch.int64, device=model.device))
    rotary = decoder.rotary(positions)
    for layer in range(decoder.config.layers):
        x = decoder.layer(layer, x, rotary, attention)
    decoder.logits(x[-1:])
