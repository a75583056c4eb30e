"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos at their own size, positions with three components.

Sources: arXiv:2409.12191 (M-RoPE), arXiv:2502.13923 (window attention in the encoder), arXiv:2511.21631 (deepstack,
interleaved M-RoPE).
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any, ClassVar, Final

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import ImageShape, ImageTools, ModelIdentity, ModelShape, VideoShape
from prismserve.models.config import DecoderConfig
from prismserve.models.grids import MergedGrid
from prismserve.models.keys import TEXT, renamed, rules
from prismserve.models.seeing import SeeingModel, borrowed_vision
from prismserve.models.video_grids import MergedFrames, StampedFrames

if TYPE_CHECKING:
    import torch

_MODELS: Final = {
    "qwen2_vl": ("transformers.models.qwen2_vl.modeling_qwen2_vl", "Qwen2VLModel"),
    "qwen2_5_vl": ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLModel"),
    "qwen3_vl": ("transformers.models.qwen3_vl.modeling_qwen3_vl", "Qwen3VLModel"),
}
# Before transformers 4.52 the decoder's keys began with ``model.`` alone, and the encoder's with ``visual.``.
_KEYS: Final = rules(
    (r"^(?:model\.)?visual\.", "vision.visual."),
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "decoder."),
)
_TYPICAL_PX: Final = 448


class QwenVL:
    """The dense checkpoints, in the hub's older key layout and in the current one."""

    architectures: ClassVar[tuple[str, ...]] = (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    )

    def shape(self, config: Any) -> ModelShape:
        """Decoder of ``text_config``; the grid is that of an image of 448 x 448 pixels."""
        vision = config.vision_config
        decoder = DecoderConfig.from_hf(config.text_config, tie_word_embeddings=config.tie_word_embeddings)
        taps = tuple(getattr(vision, "deepstack_visual_indexes", None) or ())
        if len(taps) > decoder.layers:
            message = f"config.json adds visual features after {len(taps)} layers of a decoder of {decoder.layers}"
            raise ModelLoadError(message, field="model")
        side = max(1, _TYPICAL_PX // (vision.patch_size * vision.spatial_merge_size))
        # Tokens stand in one raster and pass through the merger one by one, so a method may choose among them; it gets
        # no look into the encoder, whose attention is between patches before the merger and partly within windows.
        image = ImageShape(config.image_token_id, _TYPICAL_PX, _TYPICAL_PX, (side, side), frozenset())
        return ModelShape(dataclasses.replace(decoder, deepstack_layers=len(taps)), image, VideoShape(frozenset()))

    def rename(self, key: str) -> str:
        """Either layout's key to the name of a weight target."""
        return renamed(key, (*TEXT, *_KEYS))

    def images(self, config: Any, shape: ImageShape, tools: ImageTools) -> MergedGrid:
        """One grid in the image's own proportions."""
        return MergedGrid(config, shape, tools)

    def videos(self, config: Any, shape: ImageShape, tools: ImageTools) -> MergedFrames:  # noqa: ARG002
        """A grid for each pair of frames, with time stamps between them in Qwen3-VL."""
        recipe = StampedFrames if config.model_type == "qwen3_vl" else MergedFrames
        return recipe(config, tools)

    def build(
        self, config: Any, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype
    ) -> SeeingModel:
        """Allocate encoder and decoder."""
        module, name = _MODELS[config.model_type]
        model_class = getattr(importlib.import_module(module), name)
        return SeeingModel(borrowed_vision(model_class, config, device, dtype), shape, identity, device, dtype)


FAMILY = QwenVL()
