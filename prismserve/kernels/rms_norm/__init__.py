"""Root-mean-square normalisation over the last axis."""

from prismserve.kernels.rms_norm.reference import rms_norm

__all__ = ["rms_norm"]
