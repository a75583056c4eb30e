"""LLaVA-OneVision: tiles for an image that is alone, an overview each for several, pooled frames for a video.

Source: arXiv:2408.03326.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import (
    NEED_UNPOOLED,
    EncodedImage,
    ImageInputs,
    ImageLayout,
    ImageShape,
    ImageTools,
    ModelIdentity,
    ModelShape,
    VideoShape,
)
from prismserve.models.config import DecoderConfig
from prismserve.models.families.llava_next import TiledRecipe
from prismserve.models.frames import CLIP_MEAN, CLIP_STD, FramePixels, FrameRecipe
from prismserve.models.keys import TEXT, TOWER, renamed
from prismserve.models.seeing import SeeingModel, borrowed_vision
from prismserve.models.vision import TowerPlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from PIL import Image

    from prismserve.core.types import FrameTimes

_ASPECT_RATIO: Final = "anyres_max_"


class OneVisionRecipe(TiledRecipe):
    """As LLaVA-NeXT for an image that is alone, but scaled down to a number of tiles' patches at most."""

    def __init__(self, config: Any, shape: ImageShape, tools: ImageTools) -> None:
        """Tile up to ``vision_aspect_ratio``."""
        super().__init__(config, shape, tools)
        self.tiles_max = int(config.vision_aspect_ratio.removeprefix(_ASPECT_RATIO))

    def splits(self) -> bool:
        """Only an image that is alone is tiled."""
        return True

    def picture(self, height_px: int, width_px: int) -> tuple[int, int]:
        """(rows, columns) of patches of the tiled picture, scaled down where they are too many."""
        rows, columns = super().picture(height_px, width_px)
        ratio = math.sqrt(rows * columns / (self.tiles_max * self.side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def layout(self, height_px: int, width_px: int, *, alone: bool) -> ImageLayout:
        """As LLaVA-NeXT; of one among several, the overview and one token more."""
        if alone:
            return super().layout(height_px, width_px, alone=alone)
        return ImageLayout(self.shape.tokens + 1, (1, self.shape.tokens + 1))

    def tensors(self, image: Image.Image, *, alone: bool) -> Mapping[str, torch.Tensor]:
        """``pixel_values`` [1, tiles, 3, tile, tile], ``image_sizes``, and whether there are others."""
        names = ("pixel_values", "image_sizes", "batch_num_images")
        if alone:
            return self.processed([image], *names)
        # A sample of two, because the processor and the model ask whether there are several; the second is dropped.
        return self.processed([image, image.resize((1, 1))], *names)


class PooledFrames(FrameRecipe):
    """Frames at the tower's size, pooled to half the side, and one learned token behind the last.

    See :class:`prismserve.models.base.VideoRecipe`.
    """

    def __init__(self, config: Any, shape: ImageShape, tools: ImageTools) -> None:
        """Scale frames as the checkpoint's video processor says."""
        super().__init__(config.video_token_id, tools)
        settings = tools.video_settings()
        self.size_px = shape.height_px, shape.width_px
        self.side = math.ceil(shape.grid[0] / 2)
        self.pixels = FramePixels.read(settings, CLIP_MEAN, CLIP_STD)
        self.pixels.check_size(settings, *self.size_px)

    def layout(self, height_px: int, width_px: int, times: FrameTimes) -> ImageLayout:  # noqa: ARG002 - all alike
        """A grid for each frame, and one token more at the end."""
        tokens = times.frames * self.side**2
        return ImageLayout(tokens + 1, (self.side, self.side), frames=times.frames, raster=torch.arange(tokens))

    def tensors(self, frames: np.ndarray[Any, Any]) -> Mapping[str, torch.Tensor]:
        """``pixel_values_videos`` [1, frames, 3, side, side]."""
        return {"pixel_values_videos": self.pixels.tensor(frames, *self.size_px)[None]}


class OneVisionModel(SeeingModel):
    """A LLaVA-OneVision checkpoint; see :class:`prismserve.models.base.VisionLanguageModel`."""

    def features(self, inputs: ImageInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the second of a sample of two images gives is left out."""
        features, _ = super().features(inputs)
        return features[: inputs.layout.tokens], None

    def encode_images(self, images: Sequence[ImageInputs], needs: frozenset[str]) -> list[EncodedImage]:
        """As other families; of videos, also the frames that the projector gave, before they were pooled."""
        if needs != {NEED_UNPOOLED}:
            return super().encode_images(images, needs)
        return [self._with_unpooled(inputs) for inputs in images]

    def _with_unpooled(self, inputs: ImageInputs) -> EncodedImage:
        frames: list[torch.Tensor] = []
        projector: Any = self.vision.multi_modal_projector
        watching = projector.register_forward_hook(lambda _module, _inputs, output: frames.append(output))
        try:
            encoded = self._encode(inputs)
        finally:
            watching.remove()
        return dataclasses.replace(encoded, unpooled=torch.cat(frames).to(self.dtype))


class LlavaOneVision:
    """``LlavaOnevisionForConditionalGeneration`` in the hub's older key layout and in the current one."""

    architectures: ClassVar[tuple[str, ...]] = ("LlavaOnevisionForConditionalGeneration",)

    def shape(self, config: Any) -> ModelShape:
        """Decoder of ``text_config``; the grid is that of the overview."""
        vision = config.vision_config
        plan = TowerPlan.read(vision, config.vision_feature_layer, config.vision_feature_select_strategy)
        if plan.keep_class_token:
            message = (
                f"the class token of vision tower {vision.model_type!r} is kept, which LLaVA-OneVision does not tile"
            )
            raise ModelLoadError(message, field="model")
        ratio = config.vision_aspect_ratio
        if not (ratio.startswith(_ASPECT_RATIO) and ratio.removeprefix(_ASPECT_RATIO).isdecimal()):
            message = f"vision_aspect_ratio {ratio!r} is not supported; supported: {_ASPECT_RATIO}<tiles>"
            raise ModelLoadError(message, field="model")
        side = vision.image_size // vision.patch_size
        image = ImageShape(config.image_token_id, vision.image_size, vision.image_size, (side, side))
        decoder = DecoderConfig.from_hf(config.text_config, tie_word_embeddings=config.tie_word_embeddings)
        # Frames are grids and nothing else, so a method may choose among their tokens; tiles end in learned tokens.
        return ModelShape(decoder, image, VideoShape(frozenset({NEED_UNPOOLED})))

    def rename(self, key: str) -> str:
        """Either layout's key to the name of a weight target."""
        return renamed(key, (*TEXT, *TOWER))

    def images(self, config: Any, shape: ImageShape, tools: ImageTools) -> OneVisionRecipe:
        """Overview and tiles."""
        return OneVisionRecipe(config, shape, tools)

    def videos(self, config: Any, shape: ImageShape, tools: ImageTools) -> PooledFrames:
        """Pooled frames."""
        return PooledFrames(config, shape, tools)

    def build(
        self, config: Any, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype
    ) -> OneVisionModel:
        """Allocate tower, projector and decoder."""
        from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

        vision = borrowed_vision(LlavaOnevisionModel, config, device, dtype)
        return OneVisionModel(vision, shape, identity, device, dtype)


FAMILY = LlavaOneVision()
