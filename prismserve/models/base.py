"""What a loaded model offers the engine, and what a family file declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers.configuration_utils import PretrainedConfig

    from prismserve.models.config import DecoderConfig
    from prismserve.models.decoder import Decoder

NEED_CLS_ATTENTION = "cls_attention"
NEED_ENCODER_KEYS = "encoder_keys"


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """What one image takes up in the decoder, known from its size alone.

    Attributes:
        tokens: cache slots.
        grid: (rows, columns) of the visual tokens in raster order, where the image is one picture and nothing else;
            (1, tokens) where tiles follow one another or text stands between them.
        ids: token id of every slot, where some hold text; the others hold the image token. None if all hold it.
        positions: [3, tokens] int64 time, row and column of every slot, counted from the image's first position; None
            where every slot has a position of its own.
        position_span: how far the position of what follows lies behind the first; None as above.
    """

    tokens: int
    grid: tuple[int, int]
    ids: tuple[int, ...] | None = None
    positions: torch.Tensor | None = None
    position_span: int | None = None


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """One image ready for the vision encoder.

    Attributes:
        tensors: what the encoder takes, by the names transformers gives it; a batch of this image alone.
        layout: what the image takes up.
    """

    tensors: Mapping[str, torch.Tensor]
    layout: ImageLayout

    @property
    def pixels(self) -> torch.Tensor:
        """``pixel_values``, without the batch."""
        return self.tensors["pixel_values"][0]


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image after the vision encoder, before the projector.

    Attributes:
        tokens: [N, C] features of the layer(s) the projector reads; C is the projector's input width. Decoder
            embeddings already, where the family's ``project`` is the identity.
        grid: (rows, columns), rows x columns = N, raster order.
        cls_attention: [H, N] float32, softmax attention of the class token to the tokens in the encoder layer that
            made them; rows sum to 1 minus the class token's own share. For an encoder without class token, the mean
            attention each token receives. None unless asked for.
        keys: [N, H, d] keys of that layer. None unless asked for.
        deepstack: [n, N, D], what is added to the tokens after each of the decoder's first n layers, or None.
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    cls_attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    deepstack: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ImageShape:
    """How a family turns images into tokens.

    Attributes:
        image_token_id: what fills the slots of an image in the token ids.
        height_px: pixels the encoder takes; of a typical image, where that follows the image.
        width_px: as ``height_px``.
        grid: (rows, columns) of the tokens of such an image.
        reducible: what a method that reduces visual tokens may ask of the encoder (``cls_attention``,
            ``encoder_keys``); None where no method may act, because tokens have structure among them that would break.
    """

    image_token_id: int
    height_px: int
    width_px: int
    grid: tuple[int, int]
    reducible: frozenset[str] | None = None

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

    def encode_images(self, images: Sequence[ImageInputs], needs: frozenset[str]) -> list[EncodedImage]:
        """Run the vision encoder.

        Args:
            images: what ``Processor.preprocess`` returned; none is affected by the others.
            needs: of ``cls_attention`` and ``encoder_keys``, what to compute beside the tokens.

        Raises:
            EngineError: the model takes no images, or cannot give what is needed.
        """
        ...

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Visual tokens [k, C] to decoder embeddings [k, D]."""
        ...

    def weight_targets(self) -> Mapping[str, torch.Tensor]:
        """Every parameter (or view of a fused one) that a checkpoint must fill, under the family's names."""
        ...


class ImageRecipe(Protocol):
    """How a family turns a picture into slots of the decoder and inputs of its encoder; needs no weights.

    Attributes:
        placeholder_id: the token a chat template writes for an image.
        image_token_id: what fills the slots of an image.
        before: text that stands before the image wherever the template writes the placeholder.
        after: text that stands after it.
    """

    placeholder_id: int
    image_token_id: int
    before: str
    after: str

    def layout(self, height_px: int, width_px: int, *, alone: bool) -> ImageLayout:
        """What an image of this size takes up; ``alone`` if the request has no other."""
        ...

    def tensors(self, image: Image.Image, *, alone: bool) -> Mapping[str, torch.Tensor]:
        """What the encoder takes for an RGB image, by name; see :class:`ImageInputs`."""
        ...

    def splits(self) -> bool:
        """Whether an image that is ``alone`` is treated differently from one among others."""
        ...


class ImageTools(Protocol):
    """What a recipe may use of a checkpoint beside its configuration."""

    @property
    def image_processor(self) -> Any:
        """The checkpoint's own image processor, loaded when first asked for."""
        ...

    def token_ids(self, text: str) -> list[int]:
        """Ids of text the family wrote; control tokens in it are control tokens."""
        ...

    def token_text(self, token_id: int) -> str:
        """Spelling of a token; ModelLoadError if the tokenizer has none."""
        ...

    def token_id(self, text: str) -> int:
        """Id of a token; ModelLoadError if the tokenizer has none of this spelling."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """What ``processor_config.json`` says about the processor as a whole; empty if there is none."""
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

    def images(self, config: PretrainedConfig, shape: ImageShape, tools: ImageTools) -> ImageRecipe:
        """How images are read; asked only of a family whose ``shape`` has images."""
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
