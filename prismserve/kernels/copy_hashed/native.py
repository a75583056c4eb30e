"""Copying bytes and their XXH3-128 as a native kernel: memory is read once, and written past the caches."""

from __future__ import annotations

import ctypes
from typing import Final

import torch

from prismserve.kernels.copy_hashed import reference
from prismserve.kernels.native.library import call

_LONG_MIN: Final = 241
"""XXH3 has other branches for fewer bytes."""
_DIGEST_BYTES: Final = 16


def copy_hashed(source: torch.Tensor, target: torch.Tensor | None) -> bytes:
    """As the reference; other threads of Python run meanwhile."""
    nbytes = source.shape[0] if source.dim() == 1 else 0
    if nbytes < _LONG_MIN:
        return reference.copy_hashed(source, target)
    reference.check_bytes(source, target)
    digest = ctypes.create_string_buffer(_DIGEST_BYTES)
    call("copy_hashed", source.data_ptr(), None if target is None else target.data_ptr(), nbytes, digest)
    return digest.raw
