"""Attention over a paged KV cache where a sliding window or the tokens of one image decide who sees whom."""

from prismserve.kernels.masked_attention.reference import MaskedRows, masked_attention

__all__ = ["MaskedRows", "masked_attention"]
