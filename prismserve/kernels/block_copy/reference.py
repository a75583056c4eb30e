"""Block gather and scatter in plain PyTorch. Bytes are moved, whatever the dtype."""

from __future__ import annotations

import torch


def as_words(x: torch.Tensor) -> torch.Tensor:
    """A view of one-byte dtypes as uint8, which every indexing op knows; other dtypes as they are."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def check_pair(pool: torch.Tensor, groups: torch.Tensor, blocks: torch.Tensor) -> None:
    """ValueError unless ``blocks`` holds one contiguous block of the pool's shape and dtype for each group."""
    if blocks.shape != (groups.shape[0], *pool.shape[1:]) or blocks.dtype != pool.dtype or not blocks.is_contiguous():
        message = (
            f"{groups.shape[0]} blocks of {pool.dtype} {list(pool.shape[1:])} need a contiguous buffer of that shape, "
            f"got {blocks.dtype} {list(blocks.shape)}"
        )
        raise ValueError(message)


def gather_blocks(pool: torch.Tensor, groups: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Copy whole groups out of a pool.

    Args:
        pool: [G, ...], for example ``[groups, layers, 2, block_tokens, kv_heads, head_dim]`` or one layer's view of it.
        groups: [N] int32 or int64, repeats allowed.
        out: contiguous [N, ...] of the pool's dtype to write into, for example registered memory; None allocates.

    Returns:
        [N, ...] contiguous.

    Raises:
        ValueError: ``out`` has another shape or dtype, or is not contiguous.
    """
    if out is None:
        return as_words(pool).index_select(0, groups).contiguous().view(pool.dtype)
    check_pair(pool, groups, out)
    torch.index_select(as_words(pool), 0, groups, out=as_words(out))
    return out


def scatter_blocks(pool: torch.Tensor, groups: torch.Tensor, blocks: torch.Tensor) -> None:
    """Write whole groups into a pool, in place; the inverse of :func:`gather_blocks`.

    Args:
        pool: [G, ...].
        groups: [N] int32 or int64, distinct.
        blocks: contiguous [N, ...] of the pool's dtype.

    Raises:
        ValueError: ``blocks`` has another shape or dtype, or is not contiguous.
    """
    check_pair(pool, groups, blocks)
    as_words(pool).index_copy_(0, groups.long(), as_words(blocks))
