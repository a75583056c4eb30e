"""What a loaded model offers the engine, and what a family file declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from transformers.configuration_utils import PretrainedConfig

    from prismserve.models.config import DecoderConfig
    from prismserve.models.decoder import Decoder

NEED_CLS_ATTENTION = "cls_attention"
NEED_ENCODER_KEYS = "encoder_keys"


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image after the vision encoder, before the projector.

    Attributes:
        tokens: [N, C] features of the layer(s) the projector reads; C is the projector's input width.
        grid: (rows, columns), rows x columns = N, raster order.
        cls_attention: [H, N] float32, softmax attention of the class token to the tokens in the encoder layer that
            made them; rows sum to 1 minus the class token's own share. For an encoder without class token, the mean
            attention each token receives. None unless asked for.
        keys: [N, H, d] keys of that layer. None unless asked for.
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    cls_attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ImageShape:
    """How a family turns any image into tokens.

    Attributes:
        image_token_id: placeholder in the token ids, one per image before expansion.
        height_px: pixels the encoder takes.
        width_px: pixels the encoder takes.
        grid: (rows, columns) of the tokens of every image.
    """

    image_token_id: int
    height_px: int
    width_px: int
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Visual tokens of one image."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a configuration says about a model: its decoder, and its images if it sees any."""

    decoder: DecoderConfig
    image: ImageShape | None = None


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What distinguishes one loaded checkpoint from another.

    Attributes:
        fingerprint: 32 bytes over configuration, weights and compute dtype.
        encoder_fingerprint: 32 bytes; equal where images become interchangeable embeddings.
        eos_token_ids: any of them ends generation.
    """

    fingerprint: bytes
    encoder_fingerprint: bytes
    eos_token_ids: frozenset[int]


class VisionLanguageModel(Protocol):
    """A loaded model. Methods run under ``torch.inference_mode`` or without gradients; not thread-safe."""

    decoder: Decoder
    shape: ModelShape
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    image_token_id: int | None
    max_model_len: int
    vocab_size: int
    fingerprint: bytes
    encoder_fingerprint: bytes

    def encode_images(self, pixels: Sequence[torch.Tensor], needs: frozenset[str]) -> list[EncodedImage]:
        """Run the vision encoder.

        Args:
            pixels: per image, what ``Processor.preprocess`` returned.
            needs: of ``cls_attention`` and ``encoder_keys``, what to compute beside the tokens.

        Raises:
            EngineError: the model takes no images.
        """
        ...

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Visual tokens [k, C] to decoder embeddings [k, D]."""
        ...

    def weight_targets(self) -> Mapping[str, torch.Tensor]:
        """Every parameter (or view of a fused one) that a checkpoint must fill, under the family's names."""
        ...


class Family(Protocol):
    """A model family. A file of ``families`` exports one as ``FAMILY``."""

    architectures: ClassVar[tuple[str, ...]]

    def shape(self, config: PretrainedConfig) -> ModelShape:
        """Read the configuration; ModelLoadError if something in it is not supported."""
        ...

    def rename(self, key: str) -> str:
        """Name of a checkpoint tensor among ``weight_targets``; a name that is not among them is not loaded."""
        ...

    def build(
        self,
        config: PretrainedConfig,
        shape: ModelShape,
        identity: ModelIdentity,
        device: torch.device,
        dtype: torch.dtype,
    ) -> VisionLanguageModel:
        """Allocate the model; its parameters are set afterwards, through ``weight_targets``."""
        ...
