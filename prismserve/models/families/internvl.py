"""InternVL3 in the layout of transformers: tiles and a thumbnail, patches folded by pixel shuffle (arXiv:2504.10479)."""

from __future__ import annotations

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


class CroppedTiles(Recipe):
    """Tiles one after another between a start and an end token, a thumbnail last if there are several."""

    before = "<img>"
    after = "</img>"

    def layout(self, height_px: int, width_px: int, *, alone: bool) -> ImageLayout:  # noqa: ARG002 - cropped either way
        """As many equal grids as there are tiles."""
        tiles = self.tools.image_processor.get_number_of_image_patches(height_px, width_px, {"crop_to_patches": True})
        rows, columns = self.shape.grid
        return ImageLayout(tiles * rows * columns, (tiles * rows, columns))

    def tensors(self, image: Image.Image, *, alone: bool) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """``pixel_values`` [tiles, 3, tile, tile]."""
        return self.processed([image], "pixel_values", crop_to_patches=True)


class InternVL:
    """``InternVLForConditionalGeneration``."""

    architectures: ClassVar[tuple[str, ...]] = ("InternVLForConditionalGeneration",)

    def shape(self, config: Any) -> ModelShape:
        """Decoder of ``text_config``; the grid is that of one tile."""
        vision = config.vision_config
        height, width = vision.image_size
        rows, columns = (
            int(pixels // patch * config.downsample_ratio)
            for pixels, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        if rows < 1 or rows != columns:
            message = f"config.json gives tiles of {rows} x {columns} tokens; they must be square"
            raise ModelLoadError(message, field="model")
        image = ImageShape(config.image_token_id, height, width, (rows, columns))
        return ModelShape(
            DecoderConfig.from_hf(config.text_config, tie_word_embeddings=config.tie_word_embeddings), image
        )

    def rename(self, key: str) -> str:
        """Either layout's key to the name of a weight target."""
        return renamed(key, (*TEXT, *TOWER))

    def images(self, config: Any, shape: ImageShape, tools: ImageTools) -> CroppedTiles:  # noqa: ARG002
        """Tiles and thumbnail."""
        return CroppedTiles(shape, tools)

    def build(
        self, config: Any, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype
    ) -> SeeingModel:
        """Allocate tower, projector and decoder."""
        from transformers.models.internvl.modeling_internvl import InternVLModel

        return SeeingModel(borrowed_vision(InternVLModel, config, device, dtype), shape, identity, device, dtype)


FAMILY = InternVL()
