"""Copying bytes of host memory and their checksum in one pass."""

from __future__ import annotations

import torch

from prismserve.kernels.copy_hashed import native, reference
from prismserve.kernels.dispatch import use_native_on


def copy_hashed(source: torch.Tensor, target: torch.Tensor | None) -> bytes:
    """XXH3-128 of uint8 [n], copied to ``target`` unless that is None; see :func:`reference.copy_hashed`."""
    if use_native_on(source.device):
        return native.copy_hashed(source, target)
    return reference.copy_hashed(source, target)


__all__ = ["copy_hashed"]
