"""The identity on the wire: keys, then values, as they lie in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from prismserve.compression.base import Stage
from prismserve.compression.codec._sections import join
from prismserve.core.config import FrozenConfig
from prismserve.core.errors import IncompatibleLayoutError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.core.types import KVLayout


class NoneConfig(FrozenConfig):
    """Takes no parameters."""


class NoCodec:
    """Raw bytes in the machine's byte order: keys [T, kv_heads, head_dim] in the layout's dtype, then values.

    Of a quantised layout, what lies in memory: rows of codes and scales, uint8 [T, kv_heads, row_bytes].
    """

    name: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.CODEC
    section: ClassVar[str] = "control"
    source: ClassVar[str] = ""
    training_free: ClassVar[bool] = True
    lossy: ClassVar[bool] = False
    Config: ClassVar[type[FrozenConfig]] = NoneConfig

    def encoded_bytes(self, tokens: int, layout: KVLayout, config: FrozenConfig) -> int:  # noqa: ARG002 - no parameters
        """``tokens`` times the layout's bytes of one token in one layer."""
        return tokens * layout.token_layer_bytes

    def encode(self, keys: torch.Tensor, values: torch.Tensor, config: FrozenConfig) -> torch.Tensor:
        """Copy both tensors into one uint8 vector."""
        return join(self.parts(keys, values, config))

    def parts(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        config: FrozenConfig,  # noqa: ARG002 - no parameters
    ) -> Sequence[torch.Tensor]:
        """Both tensors as they are."""
        return keys, values

    def decode(
        self, encoded: torch.Tensor, tokens: int, layout: KVLayout, config: FrozenConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Split into keys and values, each [T, kv_heads, head_dim]; rows of codes if the layout is quantised.

        They share memory with ``encoded`` where it is aligned to the dtype.

        Raises:
            IncompatibleLayoutError: the length is not that of ``tokens`` tokens of this layout.
        """
        wanted = self.encoded_bytes(tokens, layout, config)
        if encoded.numel() != wanted:
            message = f"a payload of {tokens} tokens has {encoded.numel()} bytes and must have {wanted}"
            raise IncompatibleLayoutError(message)
        if layout.quantised:
            keys, values = encoded.view(2, tokens, layout.kv_heads, layout.row_bytes)
            return keys, values
        if encoded.storage_offset() % layout.dtype_bytes or encoded.data_ptr() % layout.dtype_bytes:
            encoded = encoded.clone()
        dtype: torch.dtype = getattr(torch, layout.dtype)
        keys, values = encoded.view(dtype).view(2, tokens, layout.kv_heads, layout.head_dim)
        return keys, values


METHOD = NoCodec()
