"""Products with a weight matrix in plain PyTorch, and the packed layout of weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from prismserve.kernels.rms_norm import rms_norm
from prismserve.kernels.silu_mul import silu_mul

PANEL = 16
"""Rows of a weight that lie interleaved once it is packed."""


class Norm(NamedTuple):
    """An RMS norm over the input of a product.

    Attributes:
        gain: [K].
        eps: added to the mean square.
    """

    gain: torch.Tensor
    eps: float


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    packed: bool = False,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """``norm(x) @ weight.T + bias``, then the gate, then ``+ residual``.

    Args:
        x: [..., K] of any floating dtype.
        weight: [N, K]; its values count in the dtype of ``x``, so a narrower weight loses nothing.
        bias: [N] in the dtype of ``x``.
        packed: whether ``weight`` was given to :func:`prismserve.kernels.linear.pack`.
        norm: applied to ``x`` first.
        residual: [..., N] (N / 2 if gated), added last.
        gated: the first half of the N columns is the gate of the second, see :mod:`prismserve.kernels.silu_mul`.

    Returns:
        [..., N] (N / 2 if gated) in the dtype of ``x``.
    """
    plain = unpack(weight) if packed else weight
    out = functional.linear(x if norm is None else rms_norm(x, *norm), plain.to(x.dtype), bias)
    if gated:
        out = silu_mul(out)
    return out if residual is None else residual + out


def unpack(weight: torch.Tensor) -> torch.Tensor:
    """A row-major copy of a packed weight [N, K].

    Whole groups of 16 rows are stored as panels [K][16], bfloat16 ones with column i + 8 beside column i; the rows
    that are left over are stored as they were.
    """
    columns, depth = weight.shape
    whole = columns // PANEL * PANEL
    panels = weight[:whole].reshape(-1, depth, PANEL)
    if weight.dtype == torch.bfloat16:
        panels = panels.view(-1, depth, PANEL // 2, 2).transpose(2, 3).reshape(-1, depth, PANEL)
    return torch.cat((panels.transpose(1, 2).reshape(whole, depth), weight[whole:]))
