"""4-bit KV on the wire: keys per channel in groups of tokens, values per token, two codes to a byte.

Source: KIVI (Liu et al., ICML 2024, arXiv:2402.02750), section 3: keys have outlier channels that stay the same over
tokens, values have none; the most recent tokens stay exact, because they carry most of the attention. KIVI groups
values in runs of channels too; here a value's group is its head, which is as short as KIVI's group at head_dim 32 and
up to four times as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from prismserve.compression.base import Stage, WireConfig
from prismserve.compression.codec._sections import SHORT_TOKENS, dtype_of, group_tokens, join, split
from prismserve.core.errors import IncompatibleLayoutError
from prismserve.kernels import int4
from prismserve.kernels.affine import token_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.core.types import KVLayout


class Int4Config(WireConfig):
    """Parameters of the codec.

    Attributes:
        residual: last tokens of the prompt that stay exact.
        text: codec of text tokens; they are few beside an image's, and what is asked is in them.
        group_tokens: fewest tokens that share a key channel's range; runs are cut into equal groups of at least this
            many (one group if shorter).
    """

    residual: int = Field(default=32, ge=0, le=65536, strict=True)
    text: str = Field(default="int8", min_length=1, max_length=64)
    group_tokens: int = Field(default=64, ge=SHORT_TOKENS, le=65536, strict=True)


class Int4Codec:
    """Affine codes 0 to 15 per key channel and token group, and per value token and head.

    Scales and offsets are kept in the layout's dtype: an offset is a value of the tensor, so nothing is lost by it.

    Error: a key is off by at most half a step, (max - min) / 15 of its channel in its group, a value by at most half
    a step of its token and head; scales of 16 bits add 6 % of a step, and the layout's dtype its rounding. Keys of runs
    shorter than 32 tokens are bounded like values. About 16 % of float32 and 28 % of bfloat16 at head_dim 64.

    Bytes: key scales, key offsets, value scales, value offsets, key codes, value codes.
    """

    name: ClassVar[str] = "int4"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.CODEC
    section: ClassVar[str] = "own"
    source: ClassVar[str] = "after Liu et al., KIVI, ICML 2024, arXiv:2402.02750"
    training_free: ClassVar[bool] = True
    lossy: ClassVar[bool] = True
    Config: ClassVar[type[Int4Config]] = Int4Config

    def encoded_bytes(self, tokens: int, layout: KVLayout, config: Int4Config) -> int:
        """Exact size in bytes; IncompatibleLayoutError if head_dim is odd."""
        return sum(_section_bytes(tokens, layout.kv_heads, layout.head_dim, layout.dtype_bytes, config))

    def encode(self, keys: torch.Tensor, values: torch.Tensor, config: Int4Config) -> torch.Tensor:
        """Quantise one layer; see :class:`Int4Codec` for the order of the bytes."""
        return join(self.parts(keys, values, config))

    def parts(self, keys: torch.Tensor, values: torch.Tensor, config: Int4Config) -> Sequence[torch.Tensor]:
        """The sections of :meth:`encode`."""
        tokens = keys.shape[0]
        _check_even(keys.shape[-1])
        if tokens < SHORT_TOKENS:
            key = int4.quantise_per_token(keys, scale_dtype=keys.dtype)
        else:
            key = int4.quantise_per_channel(keys, group_tokens(tokens, config.group_tokens), scale_dtype=keys.dtype)
        value = int4.quantise_per_token(values, scale_dtype=values.dtype)
        sections = (key.scale, key.offset, value.scale, value.offset, key.codes, value.codes)
        return [part for part in sections if part is not None]

    def decode(
        self, encoded: torch.Tensor, tokens: int, layout: KVLayout, config: Int4Config
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Restore keys and values, each [T, kv_heads, head_dim] in the layout's dtype.

        Raises:
            IncompatibleLayoutError: the length is not that of ``tokens`` tokens of this layout.
        """
        heads, channels, dtype = layout.kv_heads, layout.head_dim, dtype_of(layout)
        sizes = _section_bytes(tokens, heads, channels, layout.dtype_bytes, config)
        key_scale, key_offset, scale, offset, key_codes, codes = split(encoded, sizes, self.name, tokens)
        packed, per_token = (tokens, heads, channels // 2), (tokens, heads, 1)
        values = int4.dequantise_per_token(
            int4.Quantised(codes.view(packed), scale.view(dtype).view(per_token), offset.view(dtype).view(per_token)),
            dtype=dtype,
        )
        short = tokens < SHORT_TOKENS
        shape = per_token if short else (-1, heads, channels)
        key = int4.Quantised(
            key_codes.view(packed), key_scale.view(dtype).view(shape), key_offset.view(dtype).view(shape)
        )
        if short:
            return int4.dequantise_per_token(key, dtype=dtype), values
        return int4.dequantise_per_channel(key, group_tokens(tokens, config.group_tokens), dtype=dtype), values


def _section_bytes(tokens: int, heads: int, channels: int, scale_bytes: int, config: Int4Config) -> list[int]:
    """Bytes of key scales, key offsets, value scales, value offsets, key codes, value codes."""
    _check_even(channels)
    codes = tokens * heads * channels // 2
    per_token = tokens * heads * scale_bytes
    if tokens < SHORT_TOKENS:
        return [per_token, per_token, per_token, per_token, codes, codes]
    groups = token_groups(tokens, group_tokens(tokens, config.group_tokens))
    per_channel = groups * heads * channels * scale_bytes
    return [per_channel, per_channel, per_token, per_token, codes, codes]


def _check_even(channels: int) -> None:
    if channels % 2:
        message = f"codec int4 packs two channels to a byte and cannot encode a head_dim of {channels}; use int8"
        raise IncompatibleLayoutError(message, field="compression.wire.codec")


METHOD = Int4Codec()
