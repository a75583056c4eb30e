"""InternVL3 in the layout of transformers: tiles and a thumbnail, or numbered frames; patches folded by pixel shuffle.

Source: arXiv:2504.10479.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import ImageLayout, ImageShape, ImageTools, ModelIdentity, ModelShape, VideoShape
from prismserve.models.config import DecoderConfig
from prismserve.models.frames import CLIP_MEAN, CLIP_STD, FramePixels, FrameRecipe
from prismserve.models.images import Recipe
from prismserve.models.keys import TEXT, TOWER, renamed
from prismserve.models.seeing import SeeingModel, borrowed_vision

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from PIL import Image

    from prismserve.core.types import FrameTimes


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


class NumberedFrames(FrameRecipe):
    """Every frame is one tile, after its number in text; see :class:`prismserve.models.base.VideoRecipe`."""

    before = "Frame1: <img>"
    after = "</img>"

    def __init__(self, shape: ImageShape, tools: ImageTools) -> None:
        """Scale frames as the checkpoint's video processor says."""
        super().__init__(tools.token_id("<video>"), tools)
        settings = tools.video_settings()
        self.shape = shape
        self.pixels = FramePixels.read(settings, CLIP_MEAN, CLIP_STD)
        self.pixels.check_size(settings, shape.height_px, shape.width_px)

    def layout(self, height_px: int, width_px: int, times: FrameTimes) -> ImageLayout:  # noqa: ARG002 - all alike
        """A grid for each frame, with the number of the next one between two."""
        tile = self.shape.tokens
        ids: list[int] = []
        slots: list[torch.Tensor] = []
        for index in range(times.frames):
            if index:
                ids.extend(self.tools.token_ids(f"</img>\nFrame{index + 1}: <img>"))
            slots.append(torch.arange(len(ids), len(ids) + tile))
            ids.extend([self.shape.image_token_id] * tile)
        return ImageLayout(len(ids), self.shape.grid, tuple(ids), frames=times.frames, raster=torch.cat(slots))

    def tensors(self, frames: np.ndarray[Any, Any]) -> Mapping[str, torch.Tensor]:
        """``pixel_values`` [frames, 3, tile, tile]."""
        return {"pixel_values": self.pixels.tensor(frames, self.shape.height_px, self.shape.width_px)}


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
        decoder = DecoderConfig.from_hf(config.text_config, tie_word_embeddings=config.tie_word_embeddings)
        # An image is many tiles, of which a method would see one raster; the frames of a video are one tile each.
        return ModelShape(decoder, image, VideoShape(frozenset()))

    def rename(self, key: str) -> str:
        """Either layout's key to the name of a weight target."""
        return renamed(key, (*TEXT, *TOWER))

    def images(self, config: Any, shape: ImageShape, tools: ImageTools) -> CroppedTiles:  # noqa: ARG002
        """Tiles and thumbnail."""
        return CroppedTiles(shape, tools)

    def videos(self, config: Any, shape: ImageShape, tools: ImageTools) -> NumberedFrames:  # noqa: ARG002
        """A tile for each frame."""
        return NumberedFrames(shape, tools)

    def build(
        self, config: Any, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype
    ) -> SeeingModel:
        """Allocate tower, projector and decoder."""
        from transformers.models.internvl.modeling_internvl import InternVLModel

        return SeeingModel(borrowed_vision(InternVLModel, config, device, dtype), shape, identity, device, dtype)


FAMILY = InternVL()
