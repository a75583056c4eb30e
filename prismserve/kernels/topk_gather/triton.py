"""Selection of the best-scored tokens in Triton: a radix search for the K-th score, then one compacting pass."""

from __future__ import annotations

from typing import Final

import torch
import triton.language as tl

from prismserve.kernels.device import kernel, power_of_two
from prismserve.kernels.topk_gather.reference import check_selection

_LANES_MAX: Final = 4096


@kernel
def _ordered(scores: tl.tensor) -> tl.tensor:
    """Unsigned integers in the order of float32 scores; both zeros are equal, as they are among floats."""
    bits = (scores + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 0, bits | 0x80000000, ~bits)


@kernel
def _top_k_kernel(
    scores: tl.tensor, indices: tl.tensor, tokens: tl.tensor, keep: tl.tensor, stride: tl.tensor, LANES: tl.constexpr
) -> None:
    """One row: find the greatest threshold that K scores reach, bit by bit, and list what reaches it in order."""
    row = tl.program_id(0).to(tl.int64)
    source, lane = scores + row * stride, tl.arange(0, LANES)
    bit = tl.full((), 0x80000000, tl.uint32)
    threshold = tl.full((), 0, tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        reached = tl.zeros((LANES,), tl.int32)
        for first in range(0, tokens, LANES):
            live = first + lane < tokens
            order = _ordered(tl.load(source + first + lane, mask=live, other=0.0))
            reached += (live & (order >= candidate)).to(tl.int32)
        threshold = tl.where(tl.sum(reached, 0) >= keep, candidate, threshold)
        bit = bit >> 1
    above = tl.zeros((LANES,), tl.int32)
    for first in range(0, tokens, LANES):
        live = first + lane < tokens
        order = _ordered(tl.load(source + first + lane, mask=live, other=0.0))
        above += (live & (order > threshold)).to(tl.int32)
    ties = keep - tl.sum(above, 0)
    taken = tl.full((), 0, tl.int32)
    equals = tl.full((), 0, tl.int32)
    for first in range(0, tokens, LANES):
        live = first + lane < tokens
        order = _ordered(tl.load(source + first + lane, mask=live, other=0.0))
        equal = (live & (order == threshold)).to(tl.int32)
        rank = equals + tl.cumsum(equal, 0)
        chosen = live & ((order > threshold) | ((equal == 1) & (rank <= ties)))
        place = taken + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(indices + row * keep + place, (first + lane).to(tl.int64), mask=chosen)
        taken += tl.sum(chosen.to(tl.int32), 0)
        equals += tl.sum(equal, 0)


@kernel
def _gather_kernel(
    x: tl.tensor,
    indices: tl.tensor,
    out: tl.tensor,
    keep: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    stride_head: tl.tensor,
    LANES: tl.constexpr,
) -> None:
    place, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.program_id(2) * LANES + tl.arange(0, LANES)
    token = tl.load(indices + head * keep + place)
    row = tl.load(x + token * stride + head * stride_head + lane, mask=lane < width)
    tl.store(out + (place * heads + head) * width + lane, row, mask=lane < width)


def top_k(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """See the reference."""
    check_selection(scores, keep)
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    heads, tokens = scores.shape
    indices = torch.empty((heads, keep), device=scores.device, dtype=torch.int64)
    if heads and keep:
        lanes = min(power_of_two(tokens), _LANES_MAX)
        _top_k_kernel[(heads,)](scores, indices, tokens, keep, scores.stride(0), LANES=lanes, num_warps=8)
    return indices


def gather_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See the reference."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    heads, keep = indices.shape
    width = x.shape[-1]
    out = torch.empty((keep, heads, width), device=x.device, dtype=x.dtype)
    if out.numel():
        lanes = min(power_of_two(width), _LANES_MAX)
        _gather_kernel[(keep, heads, -(-width // lanes))](
            x, indices.contiguous(), out, keep, heads, width, x.stride(0), x.stride(1), LANES=lanes
        )
    return out
