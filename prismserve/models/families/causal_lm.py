"""Text-only models: Llama, Mistral, Mixtral, Qwen2, Qwen3, their mixtures of experts, and Gemma 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import ImageRecipe, ImageShape, ImageTools, ModelIdentity, ModelShape
from prismserve.models.causal import CausalModel
from prismserve.models.config import DecoderConfig

if TYPE_CHECKING:
    import torch
    from transformers.configuration_utils import PretrainedConfig


class CausalLM:
    """``model.*`` and ``lm_head.weight`` of a checkpoint are the decoder's."""

    architectures: ClassVar[tuple[str, ...]] = (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Gemma3ForCausalLM",
    )

    def shape(self, config: PretrainedConfig) -> ModelShape:
        """The text configuration is the whole configuration."""
        return ModelShape(DecoderConfig.from_hf(config))

    def rename(self, key: str) -> str:
        """``model.layers.0...`` to ``decoder.layers.0...``."""
        return f"decoder.{key.removeprefix('model.')}"

    def images(self, config: PretrainedConfig, shape: ImageShape, tools: ImageTools) -> ImageRecipe:  # noqa: ARG002
        """Refuse; never asked, since the shape has no images."""
        message = "this model reads text only"
        raise ModelLoadError(message, field="model")

    def build(
        self,
        config: PretrainedConfig,  # noqa: ARG002 - the shape says all
        shape: ModelShape,
        identity: ModelIdentity,
        device: torch.device,
        dtype: torch.dtype,
    ) -> CausalModel:
        """Allocate the decoder."""
        return CausalModel(shape, identity, device, dtype)


FAMILY = CausalLM()
