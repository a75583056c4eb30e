"""Block gather and scatter as one Triton copy kernel, over pieces of a block that are contiguous in the pool."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from prismserve.kernels.block_copy.reference import as_words, check_pair
from prismserve.kernels.device import kernel

_BLOCK: Final = 2048


@kernel
def _copy_kernel(
    pool: tl.tensor,
    groups: tl.tensor,
    blocks: tl.tensor,
    stride_group: tl.tensor,
    stride_piece: tl.tensor,
    pieces: tl.tensor,
    length: tl.tensor,
    BLOCK: tl.constexpr,
    SCATTER: tl.constexpr,
) -> None:
    block, piece = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    live = at < length
    inside = pool + tl.load(groups + block).to(tl.int64) * stride_group + piece * stride_piece + at
    outside = blocks + (block * pieces + piece) * length + at
    if SCATTER:
        tl.store(inside, tl.load(outside, mask=live), mask=live)
    else:
        tl.store(outside, tl.load(inside, mask=live), mask=live)


def _pieces(pool: torch.Tensor) -> torch.Tensor | None:
    """The pool as [G, pieces, length] with contiguous pieces, as long as its strides allow; None if they do not."""
    split = pool.dim()
    length = 1
    while split > 1 and pool.stride(split - 1) == length:
        split -= 1
        length *= pool.shape[split]
    outer = pool.shape[1:split]
    if split <= 2:
        shape = (pool.shape[0], outer.numel(), length)
        return pool.as_strided(shape, (pool.stride(0), pool.stride(1) if split == 2 else 0, 1))
    return None


def _copy(pool: torch.Tensor, groups: torch.Tensor, blocks: torch.Tensor, *, scatter: bool) -> bool:
    """Whether the pool's strides allow the kernel; if they do, the copy is made."""
    view = _pieces(as_words(pool))
    if view is None:
        return False
    _, pieces, length = view.shape
    if groups.shape[0] and pieces * length:
        _copy_kernel[(groups.shape[0], pieces, triton.cdiv(length, _BLOCK))](
            view,
            groups.contiguous(),
            as_words(blocks),
            view.stride(0),
            view.stride(1),
            pieces,
            length,
            BLOCK=_BLOCK,
            SCATTER=scatter,
        )
    return True


def gather_blocks(pool: torch.Tensor, groups: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See the reference; pools with more than one gap inside a group are made contiguous by PyTorch instead."""
    if out is None:
        out = torch.empty((groups.shape[0], *pool.shape[1:]), device=pool.device, dtype=pool.dtype)
    check_pair(pool, groups, out)
    if not _copy(pool, groups, out, scatter=False):
        torch.index_select(as_words(pool), 0, groups, out=as_words(out))
    return out


def scatter_blocks(pool: torch.Tensor, groups: torch.Tensor, blocks: torch.Tensor) -> None:
    """See the reference."""
    check_pair(pool, groups, blocks)
    if not _copy(pool, groups, blocks, scatter=True):
        as_words(pool).index_copy_(0, groups.long(), as_words(blocks))
