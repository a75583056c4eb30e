"""8-bit quantisation of keys (per channel) and values (per token), and its inverse."""

from prismserve.kernels.int8.reference import (
    Quantised,
    dequantise_per_channel,
    dequantise_per_token,
    quantise_per_channel,
    quantise_per_token,
    token_groups,
)

__all__ = [
    "Quantised",
    "dequantise_per_channel",
    "dequantise_per_token",
    "quantise_per_channel",
    "quantise_per_token",
    "token_groups",
]
