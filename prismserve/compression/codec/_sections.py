"""What the quantising codecs share: sections of bytes one after another, and the dtype of their scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from prismserve.core.errors import IncompatibleLayoutError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.core.types import KVLayout

SHORT_TOKENS: Final = 32
"""Below this, one scale per channel costs more than it saves: keys are scaled per token as values are."""
_ALIGN_BYTES: Final = 4


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of every part, one after another: uint8, 1-D."""
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])


def split(encoded: torch.Tensor, sizes: Sequence[int], codec: str, tokens: int) -> tuple[torch.Tensor, ...]:
    """The sections of a payload, views of it where it is aligned.

    Raises:
        IncompatibleLayoutError: the payload is not as long as the sections together.
    """
    if encoded.numel() != sum(sizes):
        message = f"an {codec} payload of {tokens} tokens has {encoded.numel()} bytes and must have {sum(sizes)}"
        raise IncompatibleLayoutError(message)
    if encoded.storage_offset() % _ALIGN_BYTES or encoded.data_ptr() % _ALIGN_BYTES:
        encoded = encoded.clone()
    return torch.split(encoded, list(sizes))


def group_tokens(tokens: int, least: int) -> int:
    """Size of equal groups (the last may be a little shorter), each of at least ``least`` tokens if it can."""
    groups = max(1, tokens // least)
    return -(-tokens // groups)


def dtype_of(layout: KVLayout) -> torch.dtype:
    """The torch dtype of a layout."""
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return dtype
