"""A native decoder beside the vision part of a transformers model: the base of most families that see.

The vision part is built by its own class of transformers with a language model of one tiny layer, which is thrown
away: tower, merger, tiling and everything learned between them are then the family's own, whatever they are.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from prismserve.core.errors import EngineError
from prismserve.models.base import EncodedImage, ImageInputs
from prismserve.models.causal import CausalModel
from prismserve.models.linear import take_over

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prismserve.models.base import ImageLayout, ModelIdentity, ModelShape

_LANGUAGE: Final = ("language_model", "text_model")


def borrowed_vision(model_class: type[nn.Module], config: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Everything of a transformers model but its language model.

    Args:
        model_class: the model without head, e.g. ``LlavaNextModel``.
        config: its configuration; not changed.
        device: where to allocate.
        dtype: of the parameters, which are left unset; buffers keep theirs.
    """
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    text = config.text_config
    text.num_hidden_layers, text.vocab_size, text.intermediate_size, text.pad_token_id = 1, 2, 1, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    with no_init_weights(), torch.device(device):
        model = model_class(config)
    for name in _LANGUAGE:
        if hasattr(model, name):
            delattr(model, name)
    take_over(model)
    # Parameters only: rotary frequencies are buffers, and lose their meaning in a narrow dtype.
    for parameter in model.parameters():
        parameter.requires_grad = False
        parameter.data = parameter.data.to(dtype)
    return model.eval()


class SeeingModel(CausalModel):
    """See :class:`prismserve.models.base.VisionLanguageModel`."""

    def __init__(
        self, vision: nn.Module, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Put a decoder beside ``vision``, from :func:`borrowed_vision`."""
        super().__init__(shape, identity, device, dtype)
        self.vision = vision

    def features(self, inputs: ImageInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decoder embeddings [n, D] of one image's or video's visual tokens, and [m, n, D] of its deepstack, if any."""
        vision: Any = self.vision
        encode = vision.get_video_features if "pixel_values_videos" in inputs.tensors else vision.get_image_features
        result = encode(**self.on_device(inputs.tensors), return_dict=True)
        return joined(result.pooler_output), stacked(getattr(result, "deepstack_features", None))

    def on_device(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors on the model's device, pixels in its dtype."""
        return {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in tensors.items()
        }

    def encode_images(self, images: Sequence[ImageInputs], needs: frozenset[str]) -> list[EncodedImage]:
        """One image at a time, so that an image's features never depend on what it was batched with."""
        if needs:
            message = f"the encoder of this model gives no {', '.join(sorted(needs))}"
            raise EngineError(message)
        return [self._encode(inputs) for inputs in images]

    def _encode(self, inputs: ImageInputs) -> EncodedImage:
        layout = inputs.layout
        features, deepstack = self.features(inputs)
        features = features.to(self.dtype)
        visual = None if layout.ids is None else self._visual_slots(layout).to(self.device)
        expected = layout.tokens if visual is None else int(visual.sum())
        if features.shape[0] != expected:
            message = f"the vision encoder gave {features.shape[0]} tokens for an image that has room for {expected}"
            raise EngineError(message)
        if layout.ids is None or visual is None:
            return EncodedImage(features, layout.grid, deepstack=deepstack)
        embeds = self.decoder.embed(torch.tensor(layout.ids, device=self.device).masked_fill(visual, 0))
        embeds[visual] = features
        if deepstack is not None:
            spread = deepstack.new_zeros((deepstack.shape[0], layout.tokens, deepstack.shape[2]))
            spread[:, visual] = deepstack
            deepstack = spread
        return EncodedImage(embeds, layout.grid, deepstack=deepstack)

    def _visual_slots(self, layout: ImageLayout) -> torch.Tensor:
        """[tokens] bool: which slots hold visual tokens rather than text."""
        if layout.raster is None:
            return torch.tensor([token == self.image_token_id for token in layout.ids or ()])
        return torch.zeros(layout.tokens, dtype=torch.bool).index_fill(0, layout.raster, value=True)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Nothing to do: the encoder's own merger or projector ran with it."""
        return tokens

    def weight_targets(self) -> Mapping[str, torch.Tensor]:
        """The decoder's parameters, and those of the vision part under ``vision.``."""
        seeing = {f"vision.{name}": parameter for name, parameter in self.vision.named_parameters()}
        return {**super().weight_targets(), **seeing}


def joined(pieces: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """[n, D] of what a transformers model returns for one image: a tensor of any batch, or a list of them."""
    tensor = pieces if isinstance(pieces, torch.Tensor) else torch.cat(list(pieces))
    return tensor.reshape(-1, tensor.shape[-1])


def stacked(layers: Sequence[torch.Tensor | Sequence[torch.Tensor]] | None) -> torch.Tensor | None:
    """[m, n, D] of per-layer features, each as :func:`joined` takes them."""
    return torch.stack([joined(layer) for layer in layers]) if layers else None
