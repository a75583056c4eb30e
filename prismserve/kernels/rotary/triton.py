"""Rotary embedding as a Triton kernel: one program per token and tile of heads."""

from __future__ import annotations

import torch
import triton.language as tl

from prismserve.kernels.device import kernel, power_of_two


@kernel
def _rotate_kernel(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    stride: tl.tensor,
    stride_head: tl.tensor,
    HALF: tl.constexpr,
    P: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, P)
    live = half < HALF
    mask = (head < heads)[:, None] & live[None, :]
    source = x + token * stride + head[:, None] * stride_head + half[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    cosine = tl.load(cos + token * (2 * HALF) + half, mask=live, other=0.0)[None, :]
    sine = tl.load(sin + token * (2 * HALF) + half, mask=live, other=0.0)[None, :]
    target = out + (token * heads + head)[:, None] * (2 * HALF) + half[None, :]
    tl.store(target, (first * cosine - second * sine).to(out.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (second * cosine + first * sine).to(out.dtype.element_ty), mask=mask)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See the reference."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, heads, channels = x.shape
    out = torch.empty((tokens, heads, channels), device=x.device, dtype=x.dtype)
    if out.numel():
        tile = min(power_of_two(heads), 16)
        _rotate_kernel[(tokens, -(-heads // tile))](
            x,
            cos.contiguous(),
            sin.contiguous(),
            out,
            heads,
            x.stride(0),
            x.stride(1),
            HALF=channels // 2,
            P=power_of_two(channels // 2),
            HEADS=tile,
        )
    return out
