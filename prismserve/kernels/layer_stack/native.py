"""Consecutive decoder layers as one native call: the kernels of the single layers, one after the other.

Between two products of a layer lie microseconds of arithmetic and, called one by one, several times that of Python; at
one token a step that is a third of a small model's time. The results have the bits of the single kernels.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import torch

from prismserve.kernels.native.library import ELEMENTS, call, strides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.kernels.paged_prefill.plan import Ragged

_PANEL: Final = 16


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The parts of one layer, in the order of ``Layer`` in ``source/layers.cpp``; matrices [N, K] packed.

    Attributes:
        input_norm: [D] gain of the norm before attention.
        qkv: [(H + 2 kv_heads) d, D].
        qkv_bias: of ``qkv``, or None.
        q_norm: [d] gain of the norm of every query head, or None.
        k_norm: [d] gain of the norm of every key head, or None.
        output: [D, H d].
        output_bias: of ``output``, or None.
        mlp_norm: [D] gain of the norm before the MLP.
        gate_up: [2 F, D], the gate's rows first; silu.
        gate_up_bias: of ``gate_up``, or None.
        down: [D, F].
        down_bias: of ``down``, or None.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None

    def parts(self) -> list[torch.Tensor | None]:
        """All of them, as they are."""
        return [getattr(self, field.name) for field in fields(self)]

    def suits(self) -> bool:
        """Whether the kernel can read the parts where they lie."""
        matrices = (self.qkv, self.output, self.gate_up, self.down)
        vectors = (part for part in self.parts() if part is not None and part.dim() == 1)
        return (
            self.qkv.dtype in ELEMENTS
            and all(matrix.dtype is self.qkv.dtype and matrix.is_contiguous() for matrix in matrices)
            and all(vector.dtype is torch.float32 and vector.is_contiguous() for vector in vectors)
            and self.down.shape[1] % _PANEL == 0
        )


class LayerStack:
    """Layers that one call can run. Keeps their weights; they must not be replaced, only written."""

    def __init__(self, weights: Sequence[LayerWeights], heads: int, kv_heads: int, eps: float) -> None:
        """Take the layers of a decoder, first to last; each must have ``suits()``."""
        first = weights[0]
        self._weights = tuple(weights)
        self._element = ELEMENTS[first.qkv.dtype]
        self._eps = eps
        self._width = first.output.shape[1] // heads
        self._heads, self._inner, self._qkv = heads, first.down.shape[1], first.qkv.shape[0]
        self._shape = strides((first.qkv.shape[1], self._inner, heads, kv_heads, self._width))
        pointers = [None if part is None else part.data_ptr() for layer in weights for part in layer.parts()]
        self._records = (ctypes.c_void_p * len(pointers))(*pointers)

    def run(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        slots: torch.Tensor,
        batch: Ragged,
        scale: float,
        layers: int,
    ) -> None:
        """Run the first ``layers`` layers over a step.

        Args:
            x: [T, D] float32, contiguous; overwritten by the result.
            angles: cos and sin of the tokens' positions, each [T, d] float32.
            cache: [groups, layers, 2, block_tokens, kv_heads, d], float32 or bfloat16; the step's keys and values are
                written into it.
            slots: [T] int64, ``group * block_tokens + offset`` of each token.
            batch: the step's sequences, planned for the native kernel.
            scale: of the scores.
            layers: how many to run; 0 does nothing.

        Raises:
            ValueError: the batch was planned for another number of tokens.
            MemoryError: no working memory.
        """
        tokens = x.shape[0]
        if tokens != batch.q_total or slots.shape[0] != tokens:
            message = f"the batch was planned for {batch.q_total} tokens, got {tokens}"
            raise ValueError(message)
        cos, sin = (side.contiguous() for side in angles)
        qkv, attended, gated = (
            torch.empty((tokens, width), dtype=torch.float32)
            for width in (self._qkv, self._heads * self._width, self._inner)
        )
        group, layer, side, slot, head, _ = cache.stride()
        slots = slots.contiguous()
        call(
            "layers",
            ctypes.addressof(self._records),
            layers,
            self._element,
            self._shape,
            self._eps,
            x.data_ptr(),
            tokens,
            cos.data_ptr(),
            sin.data_ptr(),
            cache.data_ptr(),
            ELEMENTS[cache.dtype],
            strides((group, side, slot, head, layer)),
            cache.shape[3],
            slots.data_ptr(),
            batch.tables.data_ptr(),
            batch.tables.shape[1],
            batch.q_starts.data_ptr(),
            batch.q_lens.data_ptr(),
            batch.kv_lens.data_ptr(),
            batch.tables.shape[0],
            scale,
            qkv.data_ptr(),
            attended.data_ptr(),
            gated.data_ptr(),
            torch.get_num_threads(),
        )
