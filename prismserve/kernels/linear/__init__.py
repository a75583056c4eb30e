"""Products with a weight matrix, fused with what stands around them: norm, bias, gate, residual."""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_native_on
from prismserve.kernels.linear import reference
from prismserve.kernels.linear.reference import Norm


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    packed: bool = False,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """[..., K] to [..., N]; see :func:`reference.linear`."""
    if packed and use_native_on(x.device):
        from prismserve.kernels.linear import native

        return native.linear(x, weight, bias, norm=norm, residual=residual, gated=gated)
    return reference.linear(x, weight, bias, packed=packed, norm=norm, residual=residual, gated=gated)


def packable(weight: torch.Tensor) -> bool:
    """Whether products with the weight run natively once it is packed."""
    kinds = (torch.float32, torch.bfloat16)
    return use_native_on(weight.device) and weight.dtype in kinds and weight.is_contiguous() and weight.numel() > 0


def pack(weight: torch.Tensor) -> None:
    """Rearrange a :func:`packable` weight [N, K] in place; it must from then on be given as ``packed``."""
    from prismserve.kernels.linear import native

    native.repack(weight, pack=True)


def rows_of(weight: torch.Tensor, ids: torch.Tensor, *, packed: bool, dtype: torch.dtype) -> torch.Tensor:
    """[T, K] of ``dtype``: rows of a weight [N, K], packed or not, by their numbers [T] int64."""
    if packed and use_native_on(weight.device):
        from prismserve.kernels.linear import native

        return native.gather(weight, ids).to(dtype)
    plain = reference.unpack(weight) if packed else weight
    return torch.nn.functional.embedding(ids, plain).to(dtype)


__all__ = ["Norm", "linear", "pack", "packable", "rows_of"]
