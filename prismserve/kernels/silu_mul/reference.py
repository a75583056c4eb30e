"""SiLU-and-multiply in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    import torch


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` (SwiGLU, arXiv:2002.05202).

    Args:
        gate_up: [..., 2F], the gate in the first half.

    Returns:
        [..., F].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
