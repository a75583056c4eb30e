"""Blocks of a paged cache copied out into one contiguous buffer, and back, for transfer and swapping."""

from __future__ import annotations

import torch

from prismserve.kernels.block_copy import reference
from prismserve.kernels.dispatch import use_triton


def gather_blocks(pool: torch.Tensor, groups: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """[N, ...] contiguous copy of the groups; see :func:`reference.gather_blocks`."""
    if use_triton(pool):
        from prismserve.kernels.block_copy import triton

        return triton.gather_blocks(pool, groups, out)
    return reference.gather_blocks(pool, groups, out)


def scatter_blocks(pool: torch.Tensor, groups: torch.Tensor, blocks: torch.Tensor) -> None:
    """Write blocks into their groups, in place; see :func:`reference.scatter_blocks`."""
    if use_triton(pool):
        from prismserve.kernels.block_copy import triton

        triton.scatter_blocks(pool, groups, blocks)
    else:
        reference.scatter_blocks(pool, groups, blocks)


__all__ = ["gather_blocks", "scatter_blocks"]
