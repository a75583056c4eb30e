"""Mistral 3 (Mistral Small 3.1 and 3.2): images in their own proportions, rows of merged patches that end in a token.

Source: arXiv:2410.07073 (Pixtral, whose tower and row marks these are); the merger is transformers' ``mistral3``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import ImageLayout, ImageShape, ImageTools, ModelIdentity, ModelShape
from prismserve.models.config import DecoderConfig
from prismserve.models.images import Recipe
from prismserve.models.keys import TEXT, TOWER, renamed
from prismserve.models.seeing import SeeingModel, borrowed_vision

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from PIL import Image


class MarkedRows(Recipe):
    """One row of merged patches after another; a break token ends each, an end token the last."""

    def __init__(self, config: Any, shape: ImageShape, tools: ImageTools) -> None:
        """Merge as the configuration says; ModelLoadError for images larger than the tower has positions for."""
        super().__init__(shape, tools)
        self.unit_px = merged_px(config)
        self.marks = tools.token_id("[IMG_BREAK]"), tools.token_id("[IMG_END]")

    def longest_px(self) -> int:
        """Longest side of an image in pixels, by the checkpoint's image processor."""
        size: Mapping[str, int] = self.tools.image_processor.size
        longest = int(size["longest_edge"])
        if longest > self.shape.height_px:
            message = (
                f"the image processor gives {longest} pixels a side, the vision tower takes {self.shape.height_px}"
            )
            raise ModelLoadError(message, field="model")
        return longest

    def layout(self, height_px: int, width_px: int, *, alone: bool) -> ImageLayout:  # noqa: ARG002 - alike either way
        """As many whole units as cover the image, which is scaled down where it is too long."""
        ratio = max(1.0, max(height_px, width_px) / self.longest_px())
        rows, columns = (math.ceil(math.floor(side / ratio) / self.unit_px) for side in (height_px, width_px))
        if not (rows and columns):
            message = "scaled down, its shorter side has no pixel left"
            raise ValueError(message)
        line_break, end = self.marks
        row = [self.shape.image_token_id] * columns
        ids = [*([*row, line_break] * rows)[:-1], end]
        return ImageLayout(len(ids), (1, len(ids)), tuple(ids))

    def tensors(self, image: Image.Image, *, alone: bool) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """``pixel_values`` [1, 3, height, width] and ``image_sizes`` [1, 2]."""
        return self.processed([image], "pixel_values", "image_sizes", patch_size=self.unit_px)


def merged_px(config: Any) -> int:
    """Side of the square of pixels that becomes one token."""
    return int(config.vision_config.patch_size) * int(config.spatial_merge_size)


class Mistral3:
    """``Mistral3ForConditionalGeneration`` in the hub's older key layout and in the current one."""

    architectures: ClassVar[tuple[str, ...]] = ("Mistral3ForConditionalGeneration",)

    def shape(self, config: Any) -> ModelShape:
        """Decoder of ``text_config``; the grid is that of the largest image, each row with its mark."""
        size = int(config.vision_config.image_size)
        side = size // merged_px(config)
        if side < 1:
            message = f"config.json merges {config.spatial_merge_size} x {config.spatial_merge_size} patches of fewer"
            raise ModelLoadError(message, field="model")
        decoder = DecoderConfig.from_hf(config.text_config, tie_word_embeddings=config.tie_word_embeddings)
        # Every row ends in a mark, so no method may choose among an image's tokens.
        return ModelShape(decoder, ImageShape(config.image_token_id, size, size, (side, side + 1)))

    def rename(self, key: str) -> str:
        """Either layout's key to the name of a weight target."""
        return renamed(key, (*TEXT, *TOWER))

    def images(self, config: Any, shape: ImageShape, tools: ImageTools) -> MarkedRows:
        """Marked rows."""
        return MarkedRows(config, shape, tools)

    def build(
        self, config: Any, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype
    ) -> SeeingModel:
        """Allocate tower, merger, projector and decoder."""
        from transformers.models.mistral3.modeling_mistral3 import Mistral3Model

        return SeeingModel(borrowed_vision(Mistral3Model, config, device, dtype), shape, identity, device, dtype)


FAMILY = Mistral3()
