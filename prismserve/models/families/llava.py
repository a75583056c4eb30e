"""LLaVA: a CLIP, SigLIP or EVA tower, a two-layer projector, a decoder (LLaVA-1.5, arXiv:2310.03744)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import nn

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import (
    NEED_CLASS_TOKEN,
    NEED_CLS_ATTENTION,
    NEED_ENCODER_KEYS,
    EncodedImage,
    ImageInputs,
    ImageShape,
    ImageTools,
    ModelIdentity,
    ModelShape,
)
from prismserve.models.causal import CausalModel
from prismserve.models.config import DecoderConfig
from prismserve.models.images import FixedGrid
from prismserve.models.linear import Linear
from prismserve.models.vision import EVA, OWN_TOWERS, TowerPlan, VisionTower

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers.configuration_utils import PretrainedConfig

# Both layouts: ``language_model.model.*`` and ``vision_tower.vision_model.*`` (hub, before transformers 4.52), and
# ``model.language_model.*``, ``model.vision_tower.*``, ``lm_head.weight`` (since).
_RENAMES: Final = (
    (re.compile(r"^(?:model\.)?language_model\.lm_head\."), "decoder.lm_head."),
    (re.compile(r"^lm_head\."), "decoder.lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?"), "decoder."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?encoder\.layers\."), "tower.layers."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?pre_layrnorm\."), "tower.pre_norm."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "tower."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), "projector."),
)


def _tower_plan(config: Any) -> TowerPlan:
    strategy = config.vision_feature_select_strategy
    return TowerPlan.read(config.vision_config, config.vision_feature_layer, strategy, OWN_TOWERS)


class Projector(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: Any, inputs: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers.activations import ACT2FN  # heavy, and only a worker builds a projector

        hidden, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        if config.projector_hidden_act not in ACT2FN:
            message = f"projector activation {config.projector_hidden_act!r} is not supported"
            raise ModelLoadError(message, field="model")
        self.linear_1 = Linear.empty(inputs, hidden, bias=bias, device=device, dtype=dtype)
        self.activation: nn.Module = ACT2FN[config.projector_hidden_act]
        self.linear_2 = Linear.empty(hidden, hidden, bias=bias, device=device, dtype=dtype)
        self.requires_grad_(requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[k, C] to [k, D]."""
        projected: torch.Tensor = self.linear_2(self.activation(self.linear_1(tokens)))
        return projected


class LlavaModel(CausalModel):
    """A LLaVA checkpoint; see :class:`prismserve.models.base.VisionLanguageModel`."""

    def __init__(
        self, config: Any, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(shape, identity, device, dtype)
        plan = _tower_plan(config)
        self.tower = VisionTower(config.vision_config, plan, device, dtype)
        self.projector = Projector(config, config.vision_config.hidden_size * len(plan.depths), device, dtype)

    def encode_images(self, images: Sequence[ImageInputs], needs: frozenset[str]) -> list[EncodedImage]:
        """One image at a time, so that an image's features never depend on what it was batched with."""
        encoded: list[EncodedImage] = []
        for image in images:
            tokens, attention, keys, left_out = self.tower(image.pixels.to(self.device, self.dtype), needs)
            encoded.append(EncodedImage(tokens, image.layout.grid, attention, keys, class_token=left_out))
        return encoded

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Visual tokens [k, C] to decoder embeddings [k, D]."""
        projected: torch.Tensor = self.projector(tokens.to(self.device, self.dtype))
        return projected

    def weight_targets(self) -> Mapping[str, torch.Tensor]:
        """Decoder, tower and projector parameters."""
        seeing = {
            f"{prefix}.{name}": parameter
            for prefix, module in (("tower", self.tower), ("projector", self.projector))
            for name, parameter in module.named_parameters()
        }
        return {**super().weight_targets(), **seeing}


class Llava:
    """``LlavaForConditionalGeneration`` in the hub's older key layout and in the current one."""

    architectures: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration",)

    def shape(self, config: Any) -> ModelShape:
        """Decoder of ``text_config``; one fixed grid of tokens per image from ``vision_config``."""
        vision = config.vision_config
        plan = _tower_plan(config)
        if vision.image_size < vision.patch_size:
            message = f"config.json gives an image_size of {vision.image_size} below its patch_size {vision.patch_size}"
            raise ModelLoadError(message, field="model")
        side = vision.image_size // vision.patch_size
        # A kept class token has no place in the picture, so the tokens then count as one row.
        grid = (1, side * side + 1) if plan.keep_class_token else (side, side)
        needs = frozenset({NEED_CLS_ATTENTION, NEED_ENCODER_KEYS})
        # What asks for it was trained with EVA's; to other towers it would be something else.
        if vision.model_type == EVA and not plan.keep_class_token:
            needs |= {NEED_CLASS_TOKEN}
        image = ImageShape(config.image_token_id, vision.image_size, vision.image_size, grid, needs)
        decoder = DecoderConfig.from_hf(config.text_config, tie_word_embeddings=config.tie_word_embeddings)
        return ModelShape(decoder, image)

    def rename(self, key: str) -> str:
        """Either layout's key to the name of a weight target."""
        for pattern, prefix in _RENAMES:
            renamed, hits = pattern.subn(prefix, key, count=1)
            if hits:
                return renamed
        return key

    def images(self, config: PretrainedConfig, shape: ImageShape, tools: ImageTools) -> FixedGrid:  # noqa: ARG002
        """Every image becomes the same grid."""
        return FixedGrid(shape, tools)

    def build(
        self,
        config: PretrainedConfig,
        shape: ModelShape,
        identity: ModelIdentity,
        device: torch.device,
        dtype: torch.dtype,
    ) -> LlavaModel:
        """Allocate tower, projector and decoder."""
        return LlavaModel(config, shape, identity, device, dtype)


FAMILY = Llava()
