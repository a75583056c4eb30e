"""Consecutive decoder layers in one call, where native kernels run; elsewhere layers are called one by one.

Its reference is the single layer: :meth:`prismserve.models.decoder.Decoder.layer`.
"""

from __future__ import annotations

from typing import Final

from prismserve.kernels.layer_stack.native import LayerStack, LayerWeights
from prismserve.kernels.native.library import ELEMENTS

STORABLE: Final = frozenset(ELEMENTS)
"""Dtypes of a cache that a stack can write."""

__all__ = ["STORABLE", "LayerStack", "LayerWeights"]
