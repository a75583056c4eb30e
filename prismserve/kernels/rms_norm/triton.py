"""RMSNorm as Triton kernels: one program per row, the row read once."""

from __future__ import annotations

from typing import Final

import torch
import triton.language as tl

from prismserve.kernels.device import kernel, power_of_two

_REGISTERS_MAX: Final = 16384
"""Widest row that is kept in registers between its two uses; wider ones are read twice."""


@kernel
def _norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    stride: tl.tensor,
    stride_residual: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    values = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, D, BLOCK):
        column = first + lane
        live = column < D
        values = tl.load(x + row * stride + column, mask=live, other=0.0).to(tl.float32)
        if ADD:
            values += tl.load(residual + row * stride_residual + column, mask=live, other=0.0).to(tl.float32)
            rounded = values.to(total.dtype.element_ty)
            tl.store(total + row * D + column, rounded, mask=live)
            values = rounded.to(tl.float32)
        squares += values * values
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / D + eps)
    for first in range(0, D, BLOCK):
        column = first + lane
        live = column < D
        if BLOCK < D:
            if ADD:
                values = tl.load(total + row * D + column, mask=live, other=0.0).to(tl.float32)
            else:
                values = tl.load(x + row * stride + column, mask=live, other=0.0).to(tl.float32)
        gain = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
        tl.store(out + row * D + column, (values * scale * gain).to(out.dtype.element_ty), mask=live)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] as [R, D] with contiguous channels and one stride between rows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _run(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    rows = _rows(x)
    other = rows if residual is None else _rows(residual)
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    total = out if residual is None else torch.empty_like(out)
    if rows.shape[0]:
        block = power_of_two(min(width, _REGISTERS_MAX))
        _norm_kernel[(rows.shape[0],)](
            rows,
            other,
            weight.contiguous(),
            out,
            total,
            rows.stride(0),
            other.stride(0),
            eps,
            D=width,
            BLOCK=block,
            ADD=residual is not None,
            num_warps=1 if block <= 512 else 4 if block <= 4096 else 8,
        )
    return out, total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See the reference."""
    return _run(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference; the sum is written and normalised in one pass."""
    return _run(x, residual, weight, eps)
