"""Copying bytes and their XXH3-128, piece by piece."""

from __future__ import annotations

from typing import Final

import torch
import xxhash

_PIECE_BYTES: Final = 256 << 10
"""Copied and hashed piece by piece, so that the hash reads what the copy has just put into the processor's cache."""


def check_bytes(source: torch.Tensor, target: torch.Tensor | None) -> None:
    """ValueError unless both are uint8 [n] on the CPU, without gaps and equally long."""
    for tensor in (source, target):
        if tensor is not None and (
            tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.is_cuda or not tensor.is_contiguous()
        ):
            message = f"bytes must be a contiguous uint8 [n] tensor on the CPU, got {tensor.dtype} {list(tensor.shape)}"
            raise ValueError(message)
    if target is not None and target.shape != source.shape:
        message = f"{source.shape[0]} bytes do not fit into {target.shape[0]}"
        raise ValueError(message)


def copy_hashed(source: torch.Tensor, target: torch.Tensor | None) -> bytes:
    """Copy bytes and hash what was copied.

    Args:
        source: uint8 [n] on the CPU.
        target: uint8 [n] on the CPU, which does not overlap ``source``; None to hash only.

    Returns:
        16 bytes: XXH3-128 (xxHash 0.8, seed 0) in canonical form.

    Raises:
        ValueError: the tensors are not of this form.
    """
    check_bytes(source, target)
    state = xxhash.xxh3_128()
    for start in range(0, source.shape[0], _PIECE_BYTES):
        piece = source[start : start + _PIECE_BYTES]
        if target is not None:
            piece = target[start : start + _PIECE_BYTES].copy_(piece)
        state.update(piece.numpy().data)
    return state.digest()
