"""Rotary embedding as a native kernel, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prismserve.kernels.native.library import call

if TYPE_CHECKING:
    from collections.abc import Sequence


def rotate_heads(
    x: torch.Tensor, angles: Sequence[torch.Tensor], gains: tuple[torch.Tensor, torch.Tensor, int, float] | None
) -> torch.Tensor:
    """Overwrites ``x`` [T, H, d] float32, whose heads lie one after another, and returns it."""
    tokens, heads, width = x.shape
    cos, sin = (side if side.is_contiguous() else side.contiguous() for side in angles)
    q_gain, k_gain, queries, eps = (None, None, 0, 0.0) if gains is None else gains
    q_gain, k_gain = (None if gain is None else gain.float().contiguous() for gain in (q_gain, k_gain))
    call(
        "rotary",
        x.data_ptr(),
        x.stride(0),
        tokens,
        heads,
        width,
        cos.data_ptr(),
        sin.data_ptr(),
        width,
        None if q_gain is None else q_gain.data_ptr(),
        None if k_gain is None else k_gain.data_ptr(),
        queries,
        eps,
        torch.get_num_threads(),
    )
    return x
