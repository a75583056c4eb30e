"""8-bit floating point on the wire: e4m3 with one scale per token and head, keys and values alike.

Source: FP8 Formats for Deep Learning (Micikevicius et al., 2022, arXiv:2209.05433), format E4M3. The error is relative
to each value rather than to a range, so that small channels beside large ones keep their digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from prismserve.compression.base import Stage, WireConfig
from prismserve.compression.codec._sections import dtype_of, join, split
from prismserve.kernels import fp8

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.core.types import KVLayout

_SCALE_BYTES = 4


class Fp8Config(WireConfig):
    """Takes no parameters of its own."""


class Fp8Codec:
    """Every (token, head) is scaled so that its greatest magnitude is 448, and rounded to e4m3; float32 scales.

    Error: at most 1/16 of a value whose magnitude is at least 1/28672 of its head's greatest, else at most 1/458752 of
    that greatest, plus the rounding of the layout's dtype. About 27 % of float32 and 53 % of bfloat16 at head_dim 64.

    Bytes: key scales, value scales, key codes, value codes.
    """

    name: ClassVar[str] = "fp8"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.CODEC
    section: ClassVar[str] = "own"
    source: ClassVar[str] = "8-bit floating point, arXiv:2209.05433"
    training_free: ClassVar[bool] = True
    lossy: ClassVar[bool] = True
    Config: ClassVar[type[Fp8Config]] = Fp8Config

    def encoded_bytes(self, tokens: int, layout: KVLayout, config: Fp8Config) -> int:  # noqa: ARG002 - no parameters
        """Exact size in bytes: scales, then one byte per element."""
        return sum(_section_bytes(tokens, layout.kv_heads, layout.head_dim))

    def encode(self, keys: torch.Tensor, values: torch.Tensor, config: Fp8Config) -> torch.Tensor:
        """Quantise one layer; see :class:`Fp8Codec` for the order of the bytes."""
        return join(self.parts(keys, values, config))

    def parts(self, keys: torch.Tensor, values: torch.Tensor, config: Fp8Config) -> Sequence[torch.Tensor]:  # noqa: ARG002 - no parameters
        """The sections of :meth:`encode`."""
        key, value = fp8.quantise_per_token(keys), fp8.quantise_per_token(values)
        return (key.scale, value.scale, key.codes, value.codes)

    def decode(
        self,
        encoded: torch.Tensor,
        tokens: int,
        layout: KVLayout,
        config: Fp8Config,  # noqa: ARG002 - no parameters
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Restore keys and values, each [T, kv_heads, head_dim] in the layout's dtype.

        Raises:
            IncompatibleLayoutError: the length is not that of ``tokens`` tokens of this layout.
        """
        heads, channels = layout.kv_heads, layout.head_dim
        sections = split(encoded, _section_bytes(tokens, heads, channels), self.name, tokens)
        keys, values = (
            fp8.dequantise_per_token(
                fp8.Quantised(
                    codes.view(torch.float8_e4m3fn).view(tokens, heads, channels),
                    scale.view(torch.float32).view(tokens, heads, 1),
                    None,
                ),
                dtype=dtype_of(layout),
            )
            for scale, codes in zip(sections[:2], sections[2:], strict=True)
        )
        return keys, values


def _section_bytes(tokens: int, heads: int, channels: int) -> list[int]:
    """Bytes of key scales, value scales, key codes, value codes."""
    scales, codes = tokens * heads * _SCALE_BYTES, tokens * heads * channels
    return [scales, scales, codes, codes]


METHOD = Fp8Codec()
