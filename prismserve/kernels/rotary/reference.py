"""RoPE in plain PyTorch, half-rotation convention (arXiv:2104.09864, pairing channel i with i + d/2)."""

from __future__ import annotations

import torch


def rotary_angles(positions: torch.Tensor, inverse_frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position.

    Args:
        positions: [T] int64.
        inverse_frequencies: [d/2] float32.

    Returns:
        cos and sin, each [T, d] float32, the second half of the channels repeating the first.
    """
    half = torch.outer(positions.to(torch.float32), inverse_frequencies)
    angles = torch.cat((half, half), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the heads of every token.

    Args:
        x: [T, H, d].
        cos: [T, d] float32.
        sin: [T, d] float32.

    Returns:
        [T, H, d] in the dtype of ``x``; arithmetic is float32.
    """
    half = x.shape[-1] // 2
    x32 = x.float()
    first, second = x32[..., :half], x32[..., half:]
    rotated = torch.cat((-second, first), dim=-1)
    return (x32 * cos.unsqueeze(1)).addcmul_(rotated, sin.unsqueeze(1)).to(x.dtype)
