"""A weight matrix and its bias as a module: plain while it is loaded, packed where native kernels can use it.

Weights may be stored narrower than the model computes; their values are exact either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from prismserve.kernels import linear as kernels

if TYPE_CHECKING:
    from prismserve.kernels.linear import Norm


class Linear(nn.Module):
    """``x @ weight.T + bias``, with what stands around it fused in where a kernel can.

    Attributes:
        matrix: [N, K], row-major until packed.
        bias: [N] in the compute dtype, or None.
        packed: whether ``matrix`` is packed.
    """

    def __init__(self, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.packed = False

    @classmethod
    def empty(cls, inputs: int, outputs: int, *, bias: bool, device: torch.device, dtype: torch.dtype) -> Linear:
        """Allocated, not set."""
        matrix = torch.empty((outputs, inputs), device=device, dtype=dtype)
        return cls(matrix, torch.empty(outputs, device=device, dtype=dtype) if bias else None)

    def forward(
        self,
        x: torch.Tensor,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
        *,
        gated: bool = False,
    ) -> torch.Tensor:
        """See :func:`prismserve.kernels.linear.reference.linear`."""
        return kernels.linear(x, self.matrix, self.bias, packed=self.packed, norm=norm, residual=residual, gated=gated)

    def pack(self) -> None:
        """Rearrange the weight in place, once, if native kernels are to use it."""
        if not self.packed and kernels.packable(self.matrix):
            kernels.pack(self.matrix)
            self.packed = True

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows [T, K] of the weight by their numbers [T] int64."""
        return kernels.rows_of(self.matrix, ids, packed=self.packed, dtype=dtype)


def store_as(model: nn.Module, dtype: torch.dtype) -> None:
    """Allocate the weights of every :class:`Linear` of a model anew, not set, in another dtype."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.matrix.data = torch.empty_like(module.matrix, dtype=dtype)


def pack(model: nn.Module) -> None:
    """Pack every :class:`Linear` of a model."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()
