"""8-bit KV on the wire: keys per channel, values per token.

Source: KIVI (Liu et al., ICML 2024, arXiv:2402.02750), section 3.2, at 8 bits: keys have outlier channels that stay
the same over tokens, values have none, so each is scaled along the axis where its range is small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from prismserve.compression.base import Stage, WireConfig
from prismserve.compression.codec._sections import SHORT_TOKENS, dtype_of, group_tokens, join, split
from prismserve.kernels import int8

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.core.types import KVLayout

_SCALE_BYTES = 4


class Int8Config(WireConfig):
    """Parameters of the codec.

    Attributes:
        group_tokens: fewest tokens that share a key channel's range; runs are cut into equal groups of at least this
            many (one group if shorter).
    """

    group_tokens: int = Field(default=128, ge=SHORT_TOKENS, le=65536, strict=True)


class Int8Codec:
    """Affine codes per key channel and token group, symmetric codes per value token and head; float32 scales.

    Error: a key is off by at most half of (max - min) / 255 of its channel in its group, a value by at most half of
    max|v| / 127 of its token and head, each plus the rounding of the layout's dtype; keys of runs shorter than 32
    tokens are bounded like values. About 27 % of float32 and 53 % of bfloat16 at head_dim 64.

    Bytes: key scales, key offsets (per channel only), value scales, key codes, value codes.
    """

    name: ClassVar[str] = "int8"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.CODEC
    section: ClassVar[str] = "own"
    source: ClassVar[str] = "after Liu et al., KIVI, ICML 2024, arXiv:2402.02750"
    training_free: ClassVar[bool] = True
    lossy: ClassVar[bool] = True
    Config: ClassVar[type[Int8Config]] = Int8Config

    def encoded_bytes(self, tokens: int, layout: KVLayout, config: Int8Config) -> int:
        """Exact size in bytes: scales and offsets, then one byte per element."""
        return sum(_section_bytes(tokens, layout.kv_heads, layout.head_dim, config))

    def encode(self, keys: torch.Tensor, values: torch.Tensor, config: Int8Config) -> torch.Tensor:
        """Quantise one layer; see :class:`Int8Codec` for the order of the bytes."""
        return join(self.parts(keys, values, config))

    def parts(self, keys: torch.Tensor, values: torch.Tensor, config: Int8Config) -> Sequence[torch.Tensor]:
        """The sections of :meth:`encode`."""
        tokens = keys.shape[0]
        if tokens < SHORT_TOKENS:
            key = int8.quantise_per_token(keys, symmetric=True)
        else:
            key = int8.quantise_per_channel(keys, group_tokens(tokens, config.group_tokens))
        value = int8.quantise_per_token(values, symmetric=True)
        return [part for part in (key.scale, key.offset, value.scale, key.codes, value.codes) if part is not None]

    def decode(
        self, encoded: torch.Tensor, tokens: int, layout: KVLayout, config: Int8Config
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Restore keys and values, each [T, kv_heads, head_dim] in the layout's dtype.

        Raises:
            IncompatibleLayoutError: the length is not that of ``tokens`` tokens of this layout.
        """
        heads, channels = layout.kv_heads, layout.head_dim
        sizes = _section_bytes(tokens, heads, channels, config)
        key_scale, key_offset, value_scale, key_codes, value_codes = split(encoded, sizes, self.name, tokens)
        dtype, shape = dtype_of(layout), (tokens, heads, channels)
        value = int8.Quantised(
            value_codes.view(torch.int8).view(shape), value_scale.view(torch.float32).view(tokens, heads, 1), None
        )
        values = int8.dequantise_per_token(value, dtype=dtype)
        if tokens < SHORT_TOKENS:
            key = int8.Quantised(
                key_codes.view(torch.int8).view(shape), key_scale.view(torch.float32).view(tokens, heads, 1), None
            )
            return int8.dequantise_per_token(key, dtype=dtype), values
        groups = (-1, heads, channels)
        key = int8.Quantised(
            key_codes.view(shape),
            key_scale.view(torch.float32).view(groups),
            key_offset.view(torch.float32).view(groups),
        )
        return int8.dequantise_per_channel(key, group_tokens(tokens, config.group_tokens), dtype=dtype), values


def _section_bytes(tokens: int, heads: int, channels: int, config: Int8Config) -> list[int]:
    """Bytes of key scales, key offsets, value scales, key codes, value codes."""
    codes = tokens * heads * channels
    per_token = tokens * heads * _SCALE_BYTES
    if tokens < SHORT_TOKENS:
        return [per_token, 0, per_token, codes, codes]
    groups = int8.token_groups(tokens, group_tokens(tokens, config.group_tokens))
    per_channel = groups * heads * channels * _SCALE_BYTES
    return [per_channel, per_channel, per_token, codes, codes]


METHOD = Int8Codec()
