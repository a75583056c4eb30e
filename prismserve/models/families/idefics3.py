"""Idefics3 and SmolVLM: tiles named by row and column in text, 2 x 2 and more patches folded into a token.

SmolVLM sees videos too: frames that are not split, each after its time in text.

Sources: arXiv:2408.12637 (Idefics3), arXiv:2504.05299 (SmolVLM).
"""

from __future__ import annotations

import datetime as dt
import importlib
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from PIL import Image

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import ImageLayout, ImageShape, ImageTools, ModelIdentity, ModelShape, VideoShape
from prismserve.models.config import DecoderConfig
from prismserve.models.frames import FramePixels
from prismserve.models.images import Recipe
from prismserve.models.keys import TEXT, renamed, rules
from prismserve.models.number_words import number_words
from prismserve.models.seeing import SeeingModel, borrowed_vision

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from prismserve.core.types import FrameTimes

_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"
_VISION: Final = rules((r"^(?:model\.)?(?=vision_model\.|connector\.)", "vision."))
_MODELS: Final = {
    "idefics3": ("transformers.models.idefics3.modeling_idefics3", "Idefics3Model"),
    "smolvlm": ("transformers.models.smolvlm.modeling_smolvlm", "SmolVLMModel"),
}
_WATCHES: Final = "smolvlm"
_HALF: Final = (0.5, 0.5, 0.5)
_FRAME_PX, _LONGEST_PX_MAX = 364, 4096
"""Side of a frame where the checkpoint says nothing, and the longest side anything is scaled to, by transformers."""


class NamedTiles(Recipe):
    """Tiles row by row, each after its name, then the overview; an image that is not split is an overview alone."""

    def layout(self, height_px: int, width_px: int, *, alone: bool) -> ImageLayout:  # noqa: ARG002 - split either way
        """Ids of names, tiles and overview."""
        processor = self.tools.image_processor
        _, rows, columns = processor.get_number_of_image_patches(
            height_px, width_px, {"return_row_col_info": True, "do_image_splitting": processor.do_image_splitting}
        )
        tile = self.tools.token_text(self.shape.image_token_id) * self.shape.tokens
        overview = f"{_FAKE}{_GLOBAL}{tile}{_FAKE}"
        lines = [
            "".join(f"{_FAKE}<row_{row + 1}_col_{column + 1}>{tile}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        ids = tuple(self.tools.token_ids("".join([*lines, "\n" if lines else "", overview])))
        return ImageLayout(len(ids), (1, len(ids)), ids)

    def tensors(self, image: Image.Image, *, alone: bool) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """``pixel_values`` [1, tiles, 3, tile, tile] and ``pixel_attention_mask`` [1, tiles, tile, tile]."""
        return self.processed([image], "pixel_values", "pixel_attention_mask")


class TimedFrames:
    """SmolVLM: how many frames there are in words, then each after its time; see :class:`~prismserve.models.base.VideoRecipe`.

    Frames are scaled twice, to the longest side an image may have and then to the square of a tile.
    """

    # As transformers: a text that is replaced before anything is tokenized, in a vocabulary that lacks it.
    placeholder = "<video>"

    def __init__(self, shape: ImageShape, tools: ImageTools) -> None:
        """Scale frames as the checkpoint's video processor says; ModelLoadError for another size than the tower takes."""
        from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

        settings = tools.video_settings()
        self.shape = shape
        self.tools = tools
        self.placeholder_id = shape.image_token_id
        # transformers leaves the checkpoint's template aside where there is a video.
        self.chat_template: str | None = DEFAULT_CHAT_TEMPLATE
        self.pixels = FramePixels.read(settings, _HALF, _HALF, Image.Resampling.LANCZOS)
        side = (settings.get("max_image_size") or {}).get("longest_edge", _FRAME_PX)
        if side != shape.height_px:
            message = f"the video processor gives frames of {side} pixels, the vision tower takes {shape.height_px}"
            raise ModelLoadError(message, field="model")
        sampling = settings.get("video_sampling") or {}
        self.size: Mapping[str, int] = settings.get("size") or sampling.get("video_size") or {"longest_edge": 4 * side}

    def around(self, times: FrameTimes) -> tuple[str, str]:
        """All text before the first frame's tokens, and behind the last one's."""
        # A rate is frames over seconds: their quotient may fall short of a whole number of seconds by rounding.
        duration = dt.timedelta(seconds=int(times.frames / times.rate + 1e-6))
        frames = f"{number_words(times.frames)} frames from a {duration} [H:MM:SS] video.\n"
        return f"You are provided the following series of {frames}{self._head(times.seconds[0])}", f"{_FAKE}\n\n"

    def _head(self, second: float) -> str:
        return f"\nFrame from {int(second // 60):02d}:{int(second % 60):02d}:{_FAKE}{_GLOBAL}"

    def layout(self, height_px: int, width_px: int, times: FrameTimes) -> ImageLayout:  # noqa: ARG002 - all alike
        """A grid for each frame, with the time of the next one between two."""
        tile = self.shape.tokens
        ids: list[int] = []
        slots: list[torch.Tensor] = []
        for index, second in enumerate(times.seconds):
            if index:
                ids.extend(self.tools.token_ids(f"{_FAKE}{self._head(second)}"))
            slots.append(torch.arange(len(ids), len(ids) + tile))
            ids.extend([self.shape.image_token_id] * tile)
        return ImageLayout(len(ids), self.shape.grid, tuple(ids), frames=times.frames, raster=torch.cat(slots))

    def first_size(self, height_px: int, width_px: int) -> tuple[int, int]:
        """(height, width) of the first of the two scalings; the shorter side comes out even."""
        if "longest_edge" not in self.size:
            return self.size["height"], self.size["width"]
        longest = min(_LONGEST_PX_MAX, self.size["longest_edge"])
        aspect = width_px / height_px
        if width_px >= height_px:
            height = int(longest / aspect)
            return max(1, height + height % 2), longest
        width = int(longest * aspect)
        return longest, max(1, width + width % 2)

    def tensors(self, frames: np.ndarray[Any, Any]) -> Mapping[str, torch.Tensor]:
        """``pixel_values`` [1, frames, 3, tile, tile]."""
        scaled = self.pixels.scaled(frames, *self.first_size(*frames.shape[1:3]))
        return {"pixel_values": self.pixels.tensor(scaled, self.shape.height_px, self.shape.width_px)[None]}


class Idefics3:
    """``Idefics3ForConditionalGeneration`` and ``SmolVLMForConditionalGeneration``."""

    architectures: ClassVar[tuple[str, ...]] = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")

    def shape(self, config: Any) -> ModelShape:
        """Decoder of ``text_config``; the grid is that of one tile."""
        vision = config.vision_config
        side = vision.image_size // vision.patch_size // config.scale_factor
        if side < 1:
            message = f"config.json folds {config.scale_factor} x {config.scale_factor} patches of a smaller tile"
            raise ModelLoadError(message, field="model")
        image = ImageShape(config.image_token_id, vision.image_size, vision.image_size, (side, side))
        decoder = DecoderConfig.from_hf(config.text_config, tie_word_embeddings=config.tie_word_embeddings)
        # Names of tiles stand between an image's tokens; each frame of a video is one raster.
        return ModelShape(decoder, image, VideoShape(frozenset()) if config.model_type == _WATCHES else None)

    def rename(self, key: str) -> str:
        """A checkpoint's key to the name of a weight target."""
        return renamed(key, (*TEXT, *_VISION))

    def images(self, config: Any, shape: ImageShape, tools: ImageTools) -> NamedTiles:  # noqa: ARG002
        """Named tiles."""
        return NamedTiles(shape, tools)

    def videos(self, config: Any, shape: ImageShape, tools: ImageTools) -> TimedFrames:  # noqa: ARG002
        """Frames after their times."""
        return TimedFrames(shape, tools)

    def build(
        self, config: Any, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype
    ) -> SeeingModel:
        """Allocate tower, connector and decoder."""
        module, name = _MODELS[config.model_type]
        model_class = getattr(importlib.import_module(module), name)
        return SeeingModel(borrowed_vision(model_class, config, device, dtype), shape, identity, device, dtype)


FAMILY = Idefics3()
