"""LLaVA-NeXT (1.6): an overview and tiles of any aspect ratio, a learned token at the end of each row of the picture.

Source: Liu et al., "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge", 2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import ImageLayout, ImageShape, ImageTools, ModelIdentity, ModelShape
from prismserve.models.config import DecoderConfig
from prismserve.models.images import Recipe
from prismserve.models.keys import TEXT, TOWER, renamed
from prismserve.models.seeing import SeeingModel, borrowed_vision
from prismserve.models.vision import TowerPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from PIL import Image


def unpadded(height_px: int, width_px: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of patches that hold picture, of a grid to which an image was padded.

    Follows the arithmetic of the published model step by step: another rounding would be another count.
    """
    if width_px / height_px > columns / rows:
        filled = int(round(height_px * (columns / width_px), 7))
        return rows - (rows - filled) // 2 * 2, columns
    filled = int(round(width_px * (rows / height_px), 7))
    return rows, columns - (columns - filled) // 2 * 2


class TiledRecipe(Recipe):
    """An overview of ``side`` x ``side`` patches, then the tiles' patches without padding, row by row."""

    def __init__(self, config: Any, shape: ImageShape, tools: ImageTools) -> None:
        """Tile as ``image_grid_pinpoints`` of the configuration allows."""
        super().__init__(shape, tools)
        self.pinpoints: list[list[int]] = [list(size) for size in config.image_grid_pinpoints]
        self.tile_px: int = config.vision_config.image_size
        self.side = self.tile_px // config.vision_config.patch_size

    def tile_grid(self, height_px: int, width_px: int) -> tuple[int, int]:
        """(rows, columns) of tiles."""
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution((height_px, width_px), self.pinpoints)
        return height // self.tile_px, width // self.tile_px

    def picture(self, height_px: int, width_px: int) -> tuple[int, int]:
        """(rows, columns) of patches of the tiled picture."""
        rows, columns = self.tile_grid(height_px, width_px)
        return unpadded(height_px, width_px, rows * self.side, columns * self.side)

    def layout(self, height_px: int, width_px: int, *, alone: bool) -> ImageLayout:  # noqa: ARG002 - tiled either way
        """Overview, picture, and one token more at the end of each of its rows."""
        rows, columns = self.picture(height_px, width_px)
        tokens = self.shape.tokens + rows * (columns + 1)
        return ImageLayout(tokens, (1, tokens))

    def tensors(self, image: Image.Image, *, alone: bool) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """``pixel_values`` [1, tiles, 3, tile, tile] and ``image_sizes``."""
        return self.processed([image], "pixel_values", "image_sizes")


class LlavaNext:
    """``LlavaNextForConditionalGeneration`` in the hub's older key layout and in the current one."""

    architectures: ClassVar[tuple[str, ...]] = ("LlavaNextForConditionalGeneration",)

    def shape(self, config: Any) -> ModelShape:
        """Decoder of ``text_config``; the grid is that of the overview."""
        vision = config.vision_config
        plan = TowerPlan.read(vision, config.vision_feature_layer, config.vision_feature_select_strategy)
        side = vision.image_size // vision.patch_size
        if plan.keep_class_token:
            message = "vision_feature_select_strategy 'full' leaves a class token in every tile, which does not tile"
            raise ModelLoadError(message, field="model")
        image = ImageShape(config.image_token_id, vision.image_size, vision.image_size, (side, side))
        return ModelShape(
            DecoderConfig.from_hf(config.text_config, tie_word_embeddings=config.tie_word_embeddings), image
        )

    def rename(self, key: str) -> str:
        """Either layout's key to the name of a weight target."""
        return renamed(key, (*TEXT, *TOWER))

    def images(self, config: Any, shape: ImageShape, tools: ImageTools) -> TiledRecipe:
        """Overview and tiles."""
        return TiledRecipe(config, shape, tools)

    def build(
        self, config: Any, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype
    ) -> SeeingModel:
        """Allocate tower, projector and decoder."""
        from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

        return SeeingModel(borrowed_vision(LlavaNextModel, config, device, dtype), shape, identity, device, dtype)


FAMILY = LlavaNext()
