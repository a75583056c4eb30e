"""The gate of a SwiGLU block over fused gate and up projections."""

from prismserve.kernels.silu_mul.reference import silu_mul

__all__ = ["silu_mul"]
