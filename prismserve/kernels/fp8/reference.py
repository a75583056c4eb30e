"""8-bit floating point (e4m3, arXiv:2209.05433) with one scale per token and head, in plain PyTorch."""

from __future__ import annotations

import torch

from prismserve.kernels.affine import Quantised, check_input, restore, steps, symmetric_scale

E4M3_MAX = 448.0


def quantise_per_token(x: torch.Tensor, *, scale_dtype: torch.dtype = torch.float32) -> Quantised:
    """Scale every (token, head) so that its greatest magnitude is 448, and round to e4m3.

    The relative error of a value is at most 1/16 while its magnitude is at least ``scale * 2^-6``; smaller values are off
    by at most ``scale * 2^-10``.

    Args:
        x: [T, H, d] floating point; T may be 0.
        scale_dtype: dtype of ``scale``.

    Returns:
        codes [T, H, d] float8_e4m3fn, scale [T, H, 1], no offset.

    Raises:
        ValueError: ``x`` is not a floating-point 3-D tensor.
    """
    check_input(x)
    values = x.float()
    scale = symmetric_scale(values.amin(-1, keepdim=True), values.amax(-1, keepdim=True), E4M3_MAX, scale_dtype)
    # A scale rounded down to a narrow dtype could push the greatest value over the end, which e4m3 turns into NaN.
    codes = steps(values, scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return Quantised(codes, scale, None)


def dequantise_per_token(quantised: Quantised, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Invert :func:`quantise_per_token`: [T, H, d] in ``dtype``."""
    return restore(quantised.codes, quantised.scale, None, dtype)
