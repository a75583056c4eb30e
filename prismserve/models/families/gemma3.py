"""Gemma 3: layers with and without window in turn, images whose tokens see each other both ways (arXiv:2503.19786)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import ImageLayout, ImageShape, ImageTools, ModelIdentity, ModelShape
from prismserve.models.config import DecoderConfig
from prismserve.models.images import FixedGrid
from prismserve.models.keys import TEXT, TOWER, renamed
from prismserve.models.seeing import SeeingModel, borrowed_vision

if TYPE_CHECKING:
    import torch


class FramedGrid(FixedGrid):
    """The same grid for every image, between a start and an end token and two blank lines."""

    def __init__(self, config: Any, shape: ImageShape, tools: ImageTools) -> None:
        """A template writes the start token where an image stands."""
        super().__init__(shape, tools)
        self.placeholder_id = config.boi_token_index
        self.before = f"\n\n{tools.token_text(config.boi_token_index)}"
        self.after = f"{tools.token_text(config.eoi_token_index)}\n\n"

    def layout(self, height_px: int, width_px: int, *, alone: bool) -> ImageLayout:
        """The grid of the shape; ModelLoadError for a processor that crops."""
        if self.tools.image_processor.do_pan_and_scan:
            message = "do_pan_and_scan, which adds crops of an image to the prompt, is not supported; set it to false"
            raise ModelLoadError(message, field="model")
        return super().layout(height_px, width_px, alone=alone)


class Gemma3:
    """``Gemma3ForConditionalGeneration`` in the hub's older key layout and in the current one."""

    architectures: ClassVar[tuple[str, ...]] = ("Gemma3ForConditionalGeneration",)

    def shape(self, config: Any) -> ModelShape:
        """Decoder of ``text_config``; a square grid of ``mm_tokens_per_image``."""
        vision = config.vision_config
        side = int(config.mm_tokens_per_image**0.5)
        if side < 1 or side**2 != config.mm_tokens_per_image or vision.image_size // vision.patch_size % side:
            message = (
                f"config.json asks for {config.mm_tokens_per_image} tokens an image, which do not tile its patches"
            )
            raise ModelLoadError(message, field="model")
        decoder = DecoderConfig.from_hf(config.text_config, tie_word_embeddings=config.tie_word_embeddings)
        # Every token is pooled and projected by itself, so a method may choose among them.
        image = ImageShape(config.image_token_id, vision.image_size, vision.image_size, (side, side), frozenset())
        return ModelShape(dataclasses.replace(decoder, bidirectional_images=True), image)

    def rename(self, key: str) -> str:
        """Either layout's key to the name of a weight target."""
        return renamed(key, (*TEXT, *TOWER))

    def images(self, config: Any, shape: ImageShape, tools: ImageTools) -> FramedGrid:
        """One fixed grid in its frame."""
        return FramedGrid(config, shape, tools)

    def build(
        self, config: Any, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype
    ) -> SeeingModel:
        """Allocate tower, projector and decoder."""
        from transformers.models.gemma3.modeling_gemma3 import Gemma3Model

        return SeeingModel(borrowed_vision(Gemma3Model, config, device, dtype), shape, identity, device, dtype)


FAMILY = Gemma3()
