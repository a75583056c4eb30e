"""Rotary frequencies of a decoder, and the angles of positions with one or three components."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from prismserve.kernels.rotary import rotary_angles

if TYPE_CHECKING:
    from prismserve.models.config import DecoderConfig


def inverse_frequencies(config: DecoderConfig) -> torch.Tensor:
    """[d/2] float32 rotary frequencies; ``llama3`` scaling is that of Llama 3.1."""
    frequencies = _frequencies(config.rope_theta, config.head_dim)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        long_waves = wavelengths > scaling.original_context / scaling.low_freq_factor
        short_waves = wavelengths < scaling.original_context / scaling.high_freq_factor
        stretched = torch.where(long_waves, frequencies / scaling.factor, frequencies)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        smooth = (scaling.original_context / wavelengths - scaling.low_freq_factor) / span
        between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
        return torch.where(~short_waves & ~long_waves, between, stretched)
    return frequencies


def local_frequencies(config: DecoderConfig) -> torch.Tensor | None:
    """[d/2] float32 frequencies of layers with a window, None where all layers share one set."""
    return None if config.local_rope_theta is None else _frequencies(config.local_rope_theta, config.head_dim)


def _frequencies(theta: float, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    return 1.0 / (theta**exponents)


def component_of_pair(config: DecoderConfig) -> torch.Tensor | None:
    """[d/2] int64, which component (0 time, 1 row, 2 column) of a position turns each channel pair; None for one.

    Qwen2-VL gives the components consecutive runs of pairs (arXiv:2409.12191); Qwen3-VL lets them alternate until the
    shorter ones are used up, so that each spans all frequencies.
    """
    if not config.mrope_section:
        return None
    pairs = config.head_dim // 2
    if not config.mrope_interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(config.mrope_section))
    components = torch.zeros(pairs, dtype=torch.int64)
    for component in (1, 2):
        components[component : 3 * config.mrope_section[component] : 3] = component
    return components


def position_angles(
    positions: torch.Tensor, frequencies: torch.Tensor, components: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position.

    Args:
        positions: [T] or [3, T] int64.
        frequencies: [d/2] float32.
        components: from :func:`component_of_pair`; needed for [3, T].

    Returns:
        cos and sin, each [T, d] float32, the second half of the channels repeating the first.
    """
    if positions.dim() == 1:
        return rotary_angles(positions, frequencies)
    if components is None:
        message = "positions with three components were given to a decoder whose positions have one"
        raise ValueError(message)
    half = positions.to(torch.float32)[components].T * frequencies
    angles = torch.cat((half, half), dim=-1)
    return angles.cos(), angles.sin()
