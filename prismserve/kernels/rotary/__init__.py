"""Rotary position embedding: the angles of positions, and their application to queries and keys."""

from prismserve.kernels.rotary.reference import apply_rotary, rotary_angles

__all__ = ["apply_rotary", "rotary_angles"]
