"""Idefics3 and SmolVLM: tiles named by row and column in text, 2 x 2 and more patches folded into a token.

Sources: arXiv:2408.12637 (Idefics3), arXiv:2504.05299 (SmolVLM).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar, Final

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import ImageLayout, ImageShape, ImageTools, ModelIdentity, ModelShape
from prismserve.models.config import DecoderConfig
from prismserve.models.images import Recipe
from prismserve.models.keys import TEXT, renamed, rules
from prismserve.models.seeing import SeeingModel, borrowed_vision

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from PIL import Image

_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"
_VISION: Final = rules((r"^(?:model\.)?(?=vision_model\.|connector\.)", "vision."))
_MODELS: Final = {
    "idefics3": ("transformers.models.idefics3.modeling_idefics3", "Idefics3Model"),
    "smolvlm": ("transformers.models.smolvlm.modeling_smolvlm", "SmolVLMModel"),
}


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
        return ModelShape(
            DecoderConfig.from_hf(config.text_config, tie_word_embeddings=config.tie_word_embeddings), image
        )

    def rename(self, key: str) -> str:
        """A checkpoint's key to the name of a weight target."""
        return renamed(key, (*TEXT, *_VISION))

    def images(self, config: Any, shape: ImageShape, tools: ImageTools) -> NamedTiles:  # noqa: ARG002
        """Named tiles."""
        return NamedTiles(shape, tools)

    def build(
        self, config: Any, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype
    ) -> SeeingModel:
        """Allocate tower, connector and decoder."""
        module, name = _MODELS[config.model_type]
        model_class = getattr(importlib.import_module(module), name)
        return SeeingModel(borrowed_vision(model_class, config, device, dtype), shape, identity, device, dtype)


FAMILY = Idefics3()
