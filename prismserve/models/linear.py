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
        weight: [N, K], row-major until packed.
        bias: [N] in the compute dtype, or None.
        packed: whether ``weight`` is packed.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.packed = False

    @property
    def outputs(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """K."""
        return self.weight.shape[1]

    @classmethod
    def empty(cls, inputs: int, outputs: int, *, bias: bool, device: torch.device, dtype: torch.dtype) -> Linear:
        """Allocated, not set."""
        weight = kernels.allocate(outputs, inputs, device, dtype)
        return cls(weight, torch.empty(outputs, device=device, dtype=dtype) if bias else None)

    def forward(
        self,
        x: torch.Tensor,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
        *,
        gated: bool = False,
    ) -> torch.Tensor:
        """See :func:`prismserve.kernels.linear.reference.linear`."""
        return kernels.linear(x, self.weight, self.bias, packed=self.packed, norm=norm, residual=residual, gated=gated)

    def pack(self) -> None:
        """Rearrange the weight in place, once, if native kernels are to use it."""
        if not self.packed and kernels.packable(self.weight):
            kernels.pack(self.weight)
            self.packed = True

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows [T, K] of the weight by their numbers [T] int64."""
        return kernels.rows_of(self.weight, ids, packed=self.packed, dtype=dtype)


def store_as(model: nn.Module, dtype: torch.dtype) -> None:
    """Allocate the weights of every :class:`Linear` of a model anew, not set, in another dtype."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight.data = kernels.allocate(module.outputs, module.inputs, module.weight.device, dtype)


def pack(model: nn.Module) -> None:
    """Pack every :class:`Linear` of a model."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()


def take_over(model: nn.Module) -> None:
    """Put a :class:`Linear` over the same parameters in place of every ``nn.Linear`` inside a model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                held = dict(child.named_parameters())
                bias = held.get("bias")
                setattr(module, name, Linear(held["weight"].data, None if bias is None else bias.data))
