"""SiLU-and-multiply as a native kernel."""

from __future__ import annotations

import torch

from prismserve.kernels.native.library import call


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As the reference, for float32."""
    half = gate_up.shape[-1] // 2
    rows = gate_up if gate_up.dim() == 2 else gate_up.reshape(-1, 2 * half)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty((*gate_up.shape[:-1], half), dtype=torch.float32)
    call(
        "silu_mul",
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        half,
        out.data_ptr(),
        half,
        torch.get_num_threads(),
    )
    return out
