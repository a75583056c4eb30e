"""How many bytes a transfer takes, and how pieces are cut; pure."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final

from prismserve.compression import loader
from prismserve.compression.wire import Slots, runs, table
from prismserve.core.types import KVLayout, MethodSpec

PIECE_ALIGN_BYTES: Final = 64
"""Pieces start at multiples of this in their extent: a cache line, and more than any dtype needs."""
RAW_LAYER: Final = -1
"""The ``layer`` of a payload that is raw bytes (an image embedding) rather than KV."""
_RATE_TOKENS_MAX: Final = 512


def aligned(nbytes: int) -> int:
    """Round up to the next piece boundary."""
    return -(-nbytes // PIECE_ALIGN_BYTES) * PIECE_ALIGN_BYTES


def encoded_bytes(tokens: int, codec: MethodSpec, layout: KVLayout) -> int:
    """Exact size of one layer's KV of ``tokens`` tokens under a codec."""
    return loader.codec(codec.name).encoded_bytes(tokens, layout, loader.config_of(codec, "codec"))


@functools.lru_cache(maxsize=256)
def bytes_per_token_bound(codec: MethodSpec, layout: KVLayout) -> int:
    """What one prompt token takes in an extent at most, over all layers, however the prompt is cut into pieces.

    A codec's overhead per token may change with the length of a piece (scales per group); it must not grow beyond
    512 tokens. Alignment between pieces is included.
    """
    worst = max(
        -(-aligned(encoded_bytes(tokens, codec, layout)) // tokens) for tokens in range(1, _RATE_TOKENS_MAX + 1)
    )
    return worst * layout.layers


def reserve_bytes(tokens: int, codec: MethodSpec, layout: KVLayout, slots: Slots | None = None) -> int:
    """Bytes to reserve for the last ``tokens`` slots in every layer.

    Holds too for layers that lost some of their slots, in any order of chunks. ``slots`` must be what the sender
    encodes by; None means that it encodes everything as images are.
    """
    first = 0 if slots is None else slots.tokens - tokens
    return sum(
        count * bytes_per_token_bound(table(codec)[place], layout)
        for _, count, place in runs(codec, slots, first, tokens)
    )


def reserve_layers_bytes(layer_tokens: int, codec: MethodSpec, layout: KVLayout) -> int:
    """Bytes to reserve for ``layer_tokens`` tokens, counted once in each layer that holds them."""
    return -(-layer_tokens * bytes_per_token_bound(codec, layout) // layout.layers)


def cut(start_token: int, tokens: int, token_bytes: int, bytes_max: int) -> Iterator[tuple[int, int]]:
    """Cut a run of tokens into (start, tokens) of nearly equal length, each at most ``bytes_max`` before encoding."""
    longest = max(1, bytes_max // token_bytes)
    pieces = -(-tokens // longest)
    for index in range(pieces):
        first, last = tokens * index // pieces, tokens * (index + 1) // pieces
        yield start_token + first, last - first
