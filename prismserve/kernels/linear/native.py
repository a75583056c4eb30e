"""Products with packed weights as a native kernel.

Arithmetic is float32 whatever the weights are stored as. A result is one chain of multiply-adds over K in order, so a
row's result has the same bits whatever other rows it is computed with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prismserve.kernels.native.library import ELEMENTS, call

if TYPE_CHECKING:
    from prismserve.kernels.linear.reference import Norm

_PANEL = 16


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] as [R, D] float32 with contiguous channels."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if rows.dtype is not torch.float32:
        rows = rows.float()
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _vector(values: torch.Tensor | None) -> torch.Tensor | None:
    if values is None or (values.dtype is torch.float32 and values.is_contiguous()):
        return values
    return values.float().contiguous()


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    norm: Norm | None,
    residual: torch.Tensor | None,
    gated: bool,
) -> torch.Tensor:
    """As the reference, for packed weights."""
    columns, depth = weight.shape
    if gated and columns // 2 % _PANEL:
        from prismserve.kernels.silu_mul import silu_mul

        out = silu_mul(linear(x, weight, bias, norm=norm, residual=None, gated=False))
        return out if residual is None else residual + out
    rows, bias = _rows(x), _vector(bias)
    gain = None if norm is None else _vector(norm.gain)
    added = None if residual is None or gated else _rows(residual)
    width = columns // 2 if gated else columns
    out = torch.empty((rows.shape[0], width), dtype=torch.float32)
    call(
        "linear",
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        depth,
        weight.data_ptr(),
        ELEMENTS[weight.dtype],
        columns,
        None if bias is None else bias.data_ptr(),
        None if gain is None else gain.data_ptr(),
        0.0 if norm is None else norm.eps,
        None if added is None else added.data_ptr(),
        0 if added is None else added.stride(0),
        out.data_ptr(),
        width,
        gated,
        torch.get_num_threads(),
    )
    if x.dtype is not torch.float32:
        out = out.to(x.dtype)
    if x.dim() != 2:
        out = out.view(*x.shape[:-1], width)
    return residual + out if gated and residual is not None else out


def repack(weight: torch.Tensor, *, pack: bool) -> None:
    """Pack a contiguous weight [N, K] in place, or undo it."""
    columns, depth = weight.shape
    call("repack", weight.data_ptr(), ELEMENTS[weight.dtype], columns, depth, pack, torch.get_num_threads())


def gather(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[T, K] float32: rows of a packed weight; IndexError if one of ``ids`` [T] int64 does not exist."""
    columns, depth = weight.shape
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < columns:
        message = f"a row lies outside the {columns} of the weight"
        raise IndexError(message)
    flat = ids.reshape(-1).contiguous()
    out = torch.empty((flat.shape[0], depth), dtype=torch.float32)
    call(
        "gather", weight.data_ptr(), ELEMENTS[weight.dtype], columns, depth, flat.data_ptr(), len(flat), out.data_ptr()
    )
    return out.view(*ids.shape, depth)
