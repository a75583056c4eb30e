"""The same op through flash-attn, where it is installed and its limits are met.

flash-attn pages only in blocks of 256 tokens, so keys and values are gathered first; for a chunk of hundreds of rows
that is a small part of the work.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Final

import torch

from prismserve.kernels.paged_cache.layout import LayerKV
from prismserve.kernels.paged_prefill.plan import Ragged

_CHANNELS_MAX: Final = 256
_CAPABILITY_MIN: Final = (8, 0)


@cache
def _installed() -> bool:
    return find_spec("flash_attn") is not None


def usable(q: torch.Tensor, layer: LayerKV) -> bool:
    """Whether flash-attn can attend with these queries over this layer."""
    return (
        q.is_cuda
        and _installed()
        and isinstance(layer, torch.Tensor)
        and layer.dtype == q.dtype
        and q.dtype in {torch.float16, torch.bfloat16}
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= _CHANNELS_MAX
        and torch.cuda.get_device_capability(q.device) >= _CAPABILITY_MIN
    )


def _members(lengths: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cumulative lengths [B+1] int32, and the sequence and the position in it of each of ``total`` rows (int64)."""
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    owners = torch.arange(lengths.shape[0], device=lengths.device)
    sequence = torch.repeat_interleave(owners, lengths, output_size=total)
    return ends, sequence, torch.arange(total, device=lengths.device) - ends[sequence]


def paged_prefill(
    q: torch.Tensor, layer: torch.Tensor, batch: Ragged, scale: float, *, out: torch.Tensor, with_lse: bool = False
) -> torch.Tensor | None:
    """As the reference, into ``out``; returns the log-sum-exp [T, H] float32 if asked for."""
    from flash_attn import flash_attn_varlen_func

    block_tokens = layer.shape[2]
    q_ends, q_sequence, q_position = _members(batch.q_lens, batch.q_total)
    kv_ends, kv_sequence, kv_position = _members(batch.kv_lens, batch.kv_total)
    rows = batch.q_starts[q_sequence] + q_position
    groups, offsets = batch.tables[kv_sequence, kv_position // block_tokens].long(), kv_position % block_tokens
    result = flash_attn_varlen_func(
        q[rows],
        layer[:, 0][groups, offsets],
        layer[:, 1][groups, offsets],
        q_ends,
        kv_ends,
        batch.q_len_max,
        batch.kv_len_max,
        softmax_scale=scale,
        causal=True,
        return_attn_probs=with_lse,
    )
    attended, sums = (result[0], result[1]) if with_lse else (result, None)
    out.index_copy_(0, rows, attended)
    if sums is None:
        return None
    lse = torch.full(q.shape[:2], float("-inf"), device=q.device, dtype=torch.float32)
    return lse.index_copy_(0, rows, sums.t().contiguous())
