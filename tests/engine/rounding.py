"""What each KV format makes of a row, written once more from its definition, without the package's code."""

from __future__ import annotations

from collections.abc import Callable

import torch

E4M3_BITS, E4M3_LEAST_EXPONENT, E4M3_MAX = 3, -6, 448.0


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def _divided(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x / torch.where(scale == 0, torch.ones_like(scale), scale)


def int8(rows: torch.Tensor) -> torch.Tensor:
    """[T, heads, d]: 255 levels, the greatest magnitude of a row at the end."""
    scale = _half(rows.float().abs().amax(-1, keepdim=True) / 127)
    return (_divided(rows.float(), scale).round().clamp(-127, 127) * scale).to(rows.dtype)


def int4(rows: torch.Tensor) -> torch.Tensor:
    """[T, heads, d]: 16 levels from the least to the greatest value of a row."""
    low, high = rows.float().amin(-1, keepdim=True), rows.float().amax(-1, keepdim=True)
    scale, offset = _half((high - low) / 15), _half(low)
    return (_divided(rows.float() - offset, scale).round().clamp(0, 15) * scale + offset).to(rows.dtype)


def fp8(rows: torch.Tensor) -> torch.Tensor:
    """[T, heads, d]: three bits behind the leading one, exponents from -6 on, the greatest magnitude at 448."""
    scale = _half(rows.float().abs().amax(-1, keepdim=True) / E4M3_MAX)
    scaled = _divided(rows.float(), scale).clamp(-E4M3_MAX, E4M3_MAX)
    exponent = torch.frexp(scaled).exponent.sub(1).clamp(min=E4M3_LEAST_EXPONENT)
    step = torch.ldexp(torch.ones_like(scaled), exponent - E4M3_BITS)
    return ((scaled / step).round() * step * scale).to(rows.dtype)


ROUNDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "auto": lambda rows: rows,
    "bf16": lambda rows: rows.bfloat16().to(rows.dtype),
    "fp8": fp8,
    "int8": int8,
    "int4": int4,
}
QUANTISED = ("fp8", "int8", "int4")


def row_bytes(kv_format: str, channels: int) -> int:
    """Memory of the keys or values of one token and head of a float32 model."""
    return {
        "auto": 4 * channels,
        "bf16": 2 * channels,
        "fp8": channels + 2,
        "int8": channels + 2,
        "int4": channels // 2 + 4,
    }[kv_format]
