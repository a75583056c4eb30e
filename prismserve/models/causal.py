"""A decoder with its identity: all of a text-only model, and the base of those that see."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from prismserve.core.errors import EngineError
from prismserve.models.decoder import Decoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from prismserve.models.base import EncodedImage, ImageInputs, ModelIdentity, ModelShape


class CausalModel(nn.Module):
    """See :class:`prismserve.models.base.VisionLanguageModel`; this one takes no images."""

    def __init__(self, shape: ModelShape, identity: ModelIdentity, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.device = device
        self.dtype = dtype
        self.eos_token_ids = identity.eos_token_ids
        self.fingerprint = identity.fingerprint
        self.encoder_fingerprint = identity.encoder_fingerprint
        self.max_model_len = shape.decoder.max_position_embeddings
        self.vocab_size = shape.decoder.vocab_size
        self.image_token_id = shape.image.image_token_id if shape.image else None
        self.decoder = Decoder(shape.decoder, device, dtype)

    def encode_images(self, images: Sequence[ImageInputs], needs: frozenset[str]) -> list[EncodedImage]:  # noqa: ARG002
        """Refuse any image."""
        if images:
            message = f"this model reads text only; it was given {len(images)} images"
            raise EngineError(message)
        return []

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Refuse."""
        message = f"this model reads text only; it was given {len(tokens)} visual tokens"
        raise EngineError(message)

    def weight_targets(self) -> Mapping[str, torch.Tensor]:
        """The decoder's parameters under ``decoder.``."""
        return {f"decoder.{name}": view for name, view in self.decoder.weight_targets().items()}
