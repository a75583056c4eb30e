"""What layers of the decoder see of one image or video when the question is put behind it, before any of it is cached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from prismserve.core.errors import InvalidRequestError
from prismserve.engine.scoring import score_rows

if TYPE_CHECKING:
    from prismserve.compression.base import Reduction
    from prismserve.models.base import ImageLayout
    from prismserve.models.decoder import Decoder

_TILE_ELEMENTS = 4 << 20
"""Scores written out at one time: 16 MiB of float32."""


class QuestionAttention:
    """A pass of the decoder over a medium and a text, up to a layer; see ``VisualFeatures.asked``."""

    def __init__(
        self,
        decoder: Decoder,
        layout: ImageLayout,
        media: torch.Tensor,
        deepstack: torch.Tensor | None,
        text: torch.Tensor,
    ) -> None:
        """Look at all slots of one image or video.

        Args:
            decoder: whose layers run.
            layout: of the medium.
            media: [n, D] decoder inputs of its slots.
            deepstack: [d, n, D], what is added to them after each of the first d layers.
            text: [M, D] decoder inputs of the text behind it.

        Raises:
            InvalidRequestError: layers of the decoder have windows, or let the tokens of an image see later ones.
        """
        if decoder.config.windows or decoder.config.bidirectional_images:
            message = "a visual method that asks the decoder cannot act on one with windows or two-way images"
            raise InvalidRequestError(message, field="compression.visual")
        self._decoder, self._layout = decoder, layout
        self._media, self._deepstack, self._text = media, deepstack, text

    def __call__(self, depth: float, reduction: Reduction) -> torch.Tensor:
        """[N] float32, attention the text pays to each token of the raster in the layer at ``depth`` of all layers."""
        raster = self._layout.raster
        places = torch.arange(self._layout.tokens) if raster is None else raster
        places = places.to(self._media.device)
        rows = self._text.shape[0]
        if rows == 0:
            return torch.zeros(len(places), device=places.device)
        decoder = self._decoder
        scale = decoder.config.head_dim**-0.5
        reference = int(depth * decoder.config.layers)
        rotary = decoder.rotary(self._positions(rows).to(self._media.device))
        x, slots, attention = torch.cat((self._media, self._text)), self._media.shape[0], _Causal(scale)
        for index in range(reference):
            x = decoder.layer(index, x, rotary, attention)
            if self._deepstack is not None and index < self._deepstack.shape[0]:
                x[:slots] += self._deepstack[index].to(x)
        queries, keys, _ = decoder.project(reference, x, rotary)
        return _received(queries[slots:], keys, places, scale, reduction)

    def _positions(self, rows: int) -> torch.Tensor:
        """[n + M], or [3, n + M] where positions have three components."""
        layout = self._layout
        if layout.positions is None:
            return torch.arange(layout.tokens + rows)
        behind = (layout.position_span or 0) + torch.arange(rows)
        return torch.cat((layout.positions, behind.expand(3, -1)), dim=1)


class _Causal:
    """Attention of one sequence whose tokens are all there; see ``AttentionBackend``."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """[T, H, d]."""
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale, enable_gqa=True)
        return out[0].transpose(0, 1)


def _received(
    queries: torch.Tensor, keys: torch.Tensor, places: torch.Tensor, scale: float, reduction: Reduction
) -> torch.Tensor:
    """[N] float32: mean or maximum, over the last rows of a sequence and all heads, of their attention to ``places``."""
    rows, heads, _ = queries.shape
    visible = torch.arange(keys.shape[0] - rows + 1, keys.shape[0] + 1)
    received = torch.zeros(len(places), device=keys.device)
    tile = max(1, _TILE_ELEMENTS // (heads * keys.shape[0]))
    for start in range(0, rows, tile):
        part = slice(start, start + tile)
        scores = score_rows(queries[part], keys, visible[part], scale)[0][:, :, places].flatten(0, 1)
        received = (
            received + scores.sum(0) / (rows * heads) if reduction == "mean" else received.maximum(scores.amax(0))
        )
    return received
