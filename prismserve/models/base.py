"""What a loaded model offers the engine, and what a family file declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from transformers.configuration_utils import PretrainedConfig

    from prismserve.core.types import FrameTimes
    from prismserve.models.config import DecoderConfig
    from prismserve.models.decoder import Decoder

NEED_CLS_ATTENTION = "cls_attention"
NEED_ENCODER_KEYS = "encoder_keys"
NEED_UNPOOLED = "unpooled_frames"
NEED_CLASS_TOKEN = "class_token"  # noqa: S105 - of an image


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """What one image or video takes up in the decoder, known from its size (and times) alone.

    Attributes:
        tokens: cache slots.
        grid: (rows, columns) of the visual tokens in raster order, where the image is one picture and nothing else;
            (1, tokens) where tiles follow one another or text stands between them. Of a video, those of one frame.
        ids: token id of every slot, where some hold text; the others hold the image token. None if all hold it.
        positions: [3, tokens] int64 time, row and column of every slot, counted from the image's first position; None
            where every slot has a position of its own.
        position_span: how far the position of what follows lies behind the first; None as above.
        position_reach: one more than the last position, counted from the first; None where that is the span.
        frames: of a video, how many frames of ``grid`` its tokens stand in; 1 for an image.
        raster: [frames * rows * columns] int64, ascending: the slots that stand in the frames; None if all do. The
            others (text, a closing token) are kept whatever a method does.
    """

    tokens: int
    grid: tuple[int, int]
    ids: tuple[int, ...] | None = None
    positions: torch.Tensor | None = None
    position_span: int | None = None
    position_reach: int | None = None
    frames: int = 1
    raster: torch.Tensor | None = None

    @property
    def raster_tokens(self) -> int:
        """Slots that a method may choose among."""
        return self.tokens if self.raster is None else len(self.raster)

    def kept(self, raster_tokens: int) -> int:
        """Cache slots that are left when ``raster_tokens`` of those in the raster are."""
        return self.tokens - self.raster_tokens + raster_tokens


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """One image or video ready for the vision encoder.

    Attributes:
        tensors: what the encoder takes, by the names transformers gives it; a batch of this image or video alone.
        layout: what it takes up.
    """

    tensors: Mapping[str, torch.Tensor]
    layout: ImageLayout

    @property
    def pixels(self) -> torch.Tensor:
        """``pixel_values``, without the batch."""
        return self.tensors["pixel_values"][0]


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image or video after the vision encoder, before the projector; N are all its slots.

    Attributes:
        tokens: [N, C] features of the layer(s) the projector reads; C is the projector's input width. Decoder
            embeddings already, where the family's ``project`` is the identity.
        grid: that of the layout.
        cls_attention: [H, N] float32, softmax attention of the class token to the tokens in the encoder layer that
            made them; rows sum to 1 minus the class token's own share. For an encoder without class token, the mean
            attention each token receives. None unless asked for.
        keys: [N, H, d] keys of that layer. None unless asked for.
        deepstack: [n, N, D], what is added to the tokens after each of the decoder's first n layers, or None.
        class_token: [C], the class token beside the tokens, of an encoder that leaves it out. None unless asked for.
        unpooled: of a video, [T, P, D] decoder embeddings of the patches of each frame before frames are pooled to their
            grid. None unless asked for.
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    cls_attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    deepstack: torch.Tensor | None = None
    class_token: torch.Tensor | None = None
    unpooled: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ImageShape:
    """How a family turns images into tokens.

    Attributes:
        image_token_id: what fills the slots of an image in the token ids.
        height_px: pixels the encoder takes; of a typical image, where that follows the image.
        width_px: as ``height_px``.
        grid: (rows, columns) of the tokens of such an image.
        reducible: what a method that reduces visual tokens may ask of the encoder (``cls_attention``,
            ``encoder_keys``, ``class_token``); None where no method may act, because tokens have structure among them that would break.
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
class VideoShape:
    """How a family turns videos into tokens.

    Attributes:
        reducible: what a method that reduces the tokens standing in frames may ask of the encoder (of one that pools
            frames, ``unpooled_frames``); see :class:`ImageShape`.
    """

    reducible: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a configuration says about a model: its decoder, and its images and videos if it sees any.

    A model with ``video`` has ``image`` too, and its family is a :class:`VideoFamily`.
    """

    decoder: DecoderConfig
    image: ImageShape | None = None
    video: VideoShape | None = None


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
            images: what ``Processor.preprocess`` or ``preprocess_video`` returned; none is affected by the others.
            needs: of ``cls_attention``, ``encoder_keys``, ``class_token`` and ``unpooled_frames``, what to compute beside
                the tokens.

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


class VideoRecipe(Protocol):
    """How a family turns the frames of a video into slots of the decoder and inputs of its encoder; needs no weights.

    Attributes:
        placeholder: what a chat template writes for a video; need not be a token.
        placeholder_id: the token that stands for a video among ids, until its slots take its place.
        chat_template: the template of conversations with videos, where it is not the checkpoint's own.
    """

    placeholder: str
    placeholder_id: int
    chat_template: str | None

    def around(self, times: FrameTimes) -> tuple[str, str]:
        """Text that stands before and after a video wherever the template writes the placeholder."""
        ...

    def layout(self, height_px: int, width_px: int, times: FrameTimes) -> ImageLayout:
        """What a video of this frame size takes up; ValueError for one the model cannot take."""
        ...

    def tensors(self, frames: np.ndarray[Any, Any]) -> Mapping[str, torch.Tensor]:
        """What the encoder takes for RGB frames, uint8 [frames, height, width, 3], by name."""
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

    def video_settings(self) -> Mapping[str, Any]:
        """What the checkpoint says about its video processor, from the file transformers would read."""
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


@runtime_checkable
class VideoFamily(Protocol):
    """What a family of models that see videos has beside :class:`Family`."""

    def videos(self, config: PretrainedConfig, shape: ImageShape, tools: ImageTools) -> VideoRecipe:
        """How videos are read; asked only where ``shape`` has a video."""
        ...
