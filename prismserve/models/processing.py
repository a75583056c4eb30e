"""Text and pictures to token ids and pixels, and back. Needs no weights: routers use it as well as workers."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from jinja2 import TemplateError
from transformers.models.auto.tokenization_auto import AutoTokenizer

from prismserve.core.errors import InvalidRequestError, ModelLoadError
from prismserve.core.hashing import canonical_json, digest
from prismserve.core.types import MediaKind
from prismserve.models.base import NEED_CLASS_TOKEN, NEED_CLS_ATTENTION, NEED_UNPOOLED, ImageInputs, VideoFamily
from prismserve.models.checkpoint import read_checkpoint, read_json
from prismserve.models.code_attention import NEED_CODE_ATTENTION, code_attention_directory
from prismserve.models.context_branch import NEED_CONTEXT, context_branch_directory
from prismserve.models.detokenizer import IncrementalDetokenizer
from prismserve.models.images import CheckpointTools
from prismserve.models.placing import Framed, ImageSlot, MediaSlot, VideoSlot, place, slotted
from prismserve.models.text_tower import NEED_TEXT_TOWER, folder_fingerprint, text_tower_directory
from prismserve.models.token_selector import NEED_SELECTOR, token_selector_directory
from prismserve.models.tokenization import GuardedTokenizer

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    from prismserve.core.types import FrameTimes
    from prismserve.models.base import ImageLayout, ImageRecipe, VideoRecipe
    from prismserve.models.checkpoint import Checkpoint

__all__ = ["ChatMessage", "ImageSlot", "IncrementalDetokenizer", "MediaSlot", "Part", "Processor", "VideoSlot"]

SCORING_TOKENS_MAX: Final = 512
"""Longest text a question is ranked by, in tokens."""
_ROLE: Final = re.compile(r"[a-z][a-z_]{0,31}")
_IMAGE_FILES: Final = ("preprocessor_config.json", "processor_config.json")
_PIXEL_MODES: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


Part: TypeAlias = str | MediaSlot


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message: a role (``system``, ``user``, ``assistant``) and its texts, images and videos in order."""

    role: str
    parts: tuple[Part, ...]


class Processor:
    """Tokenizer, chat template and image preprocessing of one checkpoint; thread-safe.

    Attributes:
        tokenizer: the checkpoint's own tokenizer.
        eos_token_ids: any of them ends generation.
        image_token_id: what fills the slots of an image, None for a text-only model.
        placeholder_ids: tokens that stand for images and videos, in token ids or in a template.
        max_model_len: usable context in tokens.
        vocab_size: width of the model's logits; may exceed the tokenizer's vocabulary.
        fingerprint: 32 bytes over all that decides which pixels an image becomes, how many tokens, and what is compared
            with them.
        text_tower: folder of the text tower beside the model, if it has one that fits its encoder.
        token_selector: likewise of FlexSelect's selector.
        code_attention: folder of VQToken's attention, if the model pools the frames of a video.
        context_branch: folder of LLaMA-VID's branch, if the encoder is of the kind it was trained with.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: TokenizersBackend) -> None:
        self._checkpoint = checkpoint
        self._image = checkpoint.shape.image
        self._video = checkpoint.shape.video
        self.tokenizer = tokenizer
        self.eos_token_ids = checkpoint.eos_token_ids or frozenset(
            () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        )
        self.max_model_len = checkpoint.shape.decoder.max_position_embeddings
        self.vocab_size = checkpoint.shape.decoder.vocab_size
        self.image_token_id = self._image.image_token_id if self._image else None
        self._tools = CheckpointTools(checkpoint.directory, tokenizer)
        self.placeholder_ids = self._placeholder_ids()
        self._guarded = GuardedTokenizer(tokenizer, self._spellings())
        self._template = _chat_template(checkpoint.directory, tokenizer)
        # Only an encoder that gives its class token's attention is one whose layers are known here, so CLIP's own.
        native = self._image is not None and NEED_CLS_ATTENTION in (self._image.reducible or ())
        self.text_tower = text_tower_directory(checkpoint.directory) if native else None
        self.token_selector = token_selector_directory(checkpoint.directory) if native else None
        pools = self._video is not None and NEED_UNPOOLED in (self._video.reducible or ())
        self.code_attention = code_attention_directory(checkpoint.directory) if pools else None
        classed = self._image is not None and NEED_CLASS_TOKEN in (self._image.reducible or ())
        self.context_branch = context_branch_directory(checkpoint.directory) if classed else None
        self.fingerprint = self._fingerprint()

    @classmethod
    def from_directory(cls, directory: Path | str) -> Processor:
        """Read a checkpoint directory.

        Raises:
            ModelLoadError: one sentence about the first file that is missing or damaged.
        """
        checkpoint = read_checkpoint(directory)
        tokenizer_file = checkpoint.directory / "tokenizer.json"
        if not tokenizer_file.is_file():
            message = f"{checkpoint.directory} lacks tokenizer.json; download the checkpoint again"
            raise ModelLoadError(message, field="model")
        read_json(tokenizer_file)
        if checkpoint.shape.image and not any((checkpoint.directory / name).is_file() for name in _IMAGE_FILES):
            message = f"{checkpoint.directory} lacks preprocessor_config.json; download the checkpoint again"
            raise ModelLoadError(message, field="model")
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"the tokenizer of {checkpoint.directory} cannot be loaded: {error}"
            raise ModelLoadError(message, field="model") from error
        return cls(checkpoint, tokenizer)

    @property
    def supports_images(self) -> bool:
        """Whether the model sees."""
        return self._image is not None

    @property
    def supports_videos(self) -> bool:
        """Whether the model sees videos."""
        return self._video is not None

    def _fingerprint(self) -> bytes:
        if self._image is None:
            return digest("processor")
        directory = self._checkpoint.directory
        files = {name: read_json(directory / name) for name in _IMAGE_FILES if (directory / name).is_file()}
        size = [self._image.height_px, self._image.width_px, *self._image.grid]
        folders = (self.text_tower, self.token_selector, self.code_attention, self.context_branch)
        beside = [folder_fingerprint(folder) for folder in folders if folder is not None]
        return digest("processor", canonical_json(files), canonical_json(size), *beside)

    @functools.cached_property
    def _recipe(self) -> ImageRecipe:
        if self._image is None:
            message = "this model reads text only; remove the images"
            raise InvalidRequestError(message, field="messages")
        return self._checkpoint.family.images(self._checkpoint.config, self._image, self._tools)

    @functools.cached_property
    def _video_recipe(self) -> VideoRecipe:
        family = self._checkpoint.family
        if self._image is None or self._video is None or not isinstance(family, VideoFamily):
            message = "this model takes no videos; remove them"
            raise InvalidRequestError(message, field="messages")
        return family.videos(self._checkpoint.config, self._image, self._tools)

    def _spellings(self) -> frozenset[str]:
        """What stands for images and videos in text; nothing a user types may be taken for it."""
        tokens = {self._tools.token_text(token_id) for token_id in self.placeholder_ids}
        return frozenset(tokens | ({self._video_recipe.placeholder} if self.supports_videos else set()))

    def _framed(self, slots: Sequence[MediaSlot], times: Mapping[int, FrameTimes]) -> dict[str, list[Framed]]:
        """By what a template writes for them, the media of a conversation in the family's frames."""
        framed: dict[str, list[Framed]] = {}
        for slot in slots:
            if isinstance(slot, ImageSlot):
                recipe = self._recipe
                written, token_id = self._tools.token_text(recipe.placeholder_id), recipe.image_token_id
                before, after = recipe.before, recipe.after
            else:
                clip = self._video_recipe
                written, token_id = clip.placeholder, clip.placeholder_id
                before, after = clip.around(times[slot.index])
            text = f"{before}{self._tools.token_text(token_id)}{after}"
            framed.setdefault(written, []).append(Framed(slot, token_id, text))
        return framed

    def _placeholder_ids(self) -> frozenset[int]:
        if self._image is None:
            return frozenset()
        videos = {self._video_recipe.placeholder_id} if self.supports_videos else set()
        return frozenset({self._image.image_token_id, self._recipe.placeholder_id, *videos})

    def image_layout(self, width_px: int, height_px: int, *, images: int = 1) -> ImageLayout:
        """What an image of this size takes up in the decoder, before compression.

        Args:
            width_px: width of the image.
            height_px: height of the image.
            images: how many the request has; some families split only an image that is alone.

        Raises:
            InvalidRequestError: the model takes no images, or cannot take one of this size.
            ModelLoadError: the checkpoint's image processor or tokenizer does not fit the model.
        """
        recipe = self._recipe
        if width_px < 1 or height_px < 1:
            message = f"an image of {width_px} x {height_px} pixels has no content"
            raise InvalidRequestError(message, field="messages")
        try:
            return recipe.layout(height_px, width_px, alone=images == 1)
        except ValueError as error:
            message = f"an image of {width_px} x {height_px} pixels cannot be read: {error}"
            raise InvalidRequestError(message, field="messages") from None

    def image_grid(self, width_px: int, height_px: int) -> tuple[int, int]:
        """(rows, columns) of visual tokens an image of this size becomes."""
        return self.image_layout(width_px, height_px).grid

    def image_tokens(self, width_px: int, height_px: int) -> int:
        """Cache slots an image of this size takes, before compression."""
        return self.image_layout(width_px, height_px).tokens

    def image_fingerprint(self, images: int) -> bytes:
        """32 bytes over all that decides what an image becomes, in a request that has so many of them."""
        several = images > 1 and self._image is not None and self._recipe.splits()
        return digest("images-several", self.fingerprint) if several else self.fingerprint

    @property
    def beside(self) -> frozenset[str]:
        """What methods may ask of further weights, which lie in folders beside the model's and are loaded with it."""
        return self._beside_of(MediaKind.IMAGE) | self._beside_of(MediaKind.VIDEO)

    def _beside_of(self, kind: MediaKind) -> frozenset[str]:
        """Those that read images, or videos."""
        folders = {
            NEED_TEXT_TOWER: self.text_tower,
            NEED_SELECTOR: self.token_selector,
            NEED_CONTEXT: self.context_branch,
        }
        if kind is MediaKind.VIDEO:
            folders = {NEED_CODE_ATTENTION: self.code_attention}
        return frozenset(need for need, folder in folders.items() if folder is not None)

    @property
    def frame_patches(self) -> int:
        """Patches of one frame of a video before the model pools it; 0 for a model that sees nothing."""
        return self._image.tokens if self._image else 0

    @property
    def family_name(self) -> str:
        """The file of ``families`` that serves the checkpoint."""
        return self._checkpoint.family_name

    @property
    def reducible(self) -> frozenset[str] | None:
        """What a method that reduces tokens of images may ask of the encoder; None where no method may act."""
        return self.reducible_of(MediaKind.IMAGE)

    def reducible_of(self, kind: MediaKind) -> frozenset[str] | None:
        """The same for images or videos."""
        shape = self._video if kind is MediaKind.VIDEO else self._image
        own = shape.reducible if shape else None
        return None if own is None else own | self._beside_of(kind)

    def video_layout(self, width_px: int, height_px: int, times: FrameTimes) -> ImageLayout:
        """What a video takes up in the decoder, before compression.

        Args:
            width_px: width of its frames.
            height_px: height of its frames.
            times: when they are shown; says how many there are.

        Raises:
            InvalidRequestError: the model takes no videos, or cannot take this one.
            ModelLoadError: the checkpoint's video processor or tokenizer does not fit the model.
        """
        recipe = self._video_recipe
        size = f"a video of {times.frames} frames of {width_px} x {height_px} pixels"
        if width_px < 1 or height_px < 1 or not times.frames:
            message = f"{size} has no content"
            raise InvalidRequestError(message, field="messages")
        try:
            return recipe.layout(height_px, width_px, times)
        except ValueError as error:
            message = f"{size} cannot be read: {error}"
            raise InvalidRequestError(message, field="messages") from None

    @functools.cached_property
    def video_fingerprint(self) -> bytes:
        """32 bytes over all that decides what a video becomes."""
        return digest("video-processor", self.fingerprint, canonical_json(self._tools.video_settings()))

    def preprocess_video(self, frames: np.ndarray[Any, Any], times: FrameTimes) -> ImageInputs:
        """Inputs of the vision encoder for the frames of a video.

        Args:
            frames: uint8 [frames, height, width, 3], RGB.
            times: when they are shown.

        Raises:
            InvalidRequestError: the model takes no videos, or cannot take this one.
            ModelLoadError: the checkpoint's video processor does not fit the model.
        """
        layout = self.video_layout(frames.shape[2], frames.shape[1], times)
        return ImageInputs(self._video_recipe.tensors(frames), layout)

    def prunable_of(self, kinds: Iterable[MediaKind]) -> bool:
        """Whether tokens of such media may leave between layers: no structure among them, and every layer sees all."""
        decoder = self._checkpoint.shape.decoder
        seen = not decoder.windows and not decoder.bidirectional_images
        return seen and all(self.reducible_of(kind) is not None for kind in kinds)

    def preprocess(self, image: Image.Image, *, images: int = 1) -> ImageInputs:
        """Inputs of the vision encoder, as the checkpoint's own image processor gives them.

        Args:
            image: any size; modes other than RGB are converted.
            images: how many the request has.

        Raises:
            InvalidRequestError: the model takes no images, or the image has an unusual pixel format.
            ModelLoadError: the checkpoint's image processor does not fit its vision tower.
        """
        layout = self.image_layout(*image.size, images=images)
        if image.mode not in _PIXEL_MODES:
            message = f"pixel format {image.mode!r} is not supported; use 8-bit RGB, RGBA or greyscale"
            raise InvalidRequestError(message, field="messages")
        # Converted here as well as in the processor: some checkpoints switch its conversion off.
        return ImageInputs(self._recipe.tensors(image.convert("RGB"), alone=images == 1), layout)

    def seen_box(self, width_px: int, height_px: int) -> tuple[float, float, float, float]:
        """The part of an image that the grid of its tokens covers: left, top, right, bottom in its own pixels.

        All of it, unless the checkpoint's image processor scales the shorter side and crops around the middle; where it
        pads, the box reaches beyond the image.
        """
        processor = self._tools.image_processor
        crop = getattr(processor, "crop_size", None)
        if not getattr(processor, "do_center_crop", False) or not crop:
            return 0.0, 0.0, float(width_px), float(height_px)
        width, height = float(width_px), float(height_px)
        size = dict(getattr(processor, "size", None) or {})
        scale_x = scale_y = 1.0
        if getattr(processor, "do_resize", False) and "shortest_edge" in size:
            scale_x = scale_y = size["shortest_edge"] / min(width, height)
        elif getattr(processor, "do_resize", False) and {"height", "width"} <= size.keys():
            scale_x, scale_y = size["width"] / width, size["height"] / height
        half_x, half_y = crop["width"] / scale_x / 2, crop["height"] / scale_y / 2
        return width / 2 - half_x, height / 2 - half_y, width / 2 + half_x, height / 2 + half_y

    def render_chat(
        self, messages: Sequence[ChatMessage], times: Mapping[int, FrameTimes] | None = None
    ) -> list[int | MediaSlot]:
        """Token ids of a conversation by the checkpoint's template, ready for the assistant's next turn.

        Args:
            messages: at least one. Control-token strings inside their texts are tokenized as plain text.
            times: of every video, by the index of its slot.

        Returns:
            Token ids with one slot per image and per video, not expanded.

        Raises:
            InvalidRequestError: no template, a role or order of roles the template refuses, or images or videos for a
                model that takes none.
        """
        slots = [part for message in messages for part in message.parts if not isinstance(part, str)]
        framed = self._framed(slots, times or {})
        videos = any(isinstance(slot, VideoSlot) for slot in slots)
        own = self._video_recipe.chat_template if videos else None
        rendered, placed = place(self._render(messages, own or self._template), framed)
        ids = self._guarded.encode_rendered(rendered, add_special_tokens=self._adds_special_tokens(rendered))
        return slotted(ids, placed)

    def _adds_special_tokens(self, rendered: str) -> bool:
        """Whether the tokenizer's own BOS and EOS go around a rendered chat, as transformers decides it.

        A tokenizer leaves all to its template; a multimodal processor only where the template wrote a BOS.
        """
        bos = self.tokenizer.bos_token
        return self.supports_images and not (bos is not None and rendered.startswith(bos))

    def _render(self, messages: Sequence[ChatMessage], template: str | None) -> str:
        if template is None:
            message = "this model has no chat template; use /v1/completions"
            raise InvalidRequestError(message, field="messages")
        conversation = [self._conversation_turn(index, message) for index, message in enumerate(messages)]
        try:
            rendered = self.tokenizer.apply_chat_template(
                conversation, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, IndexError) as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise InvalidRequestError(message, field="messages") from None
        return str(rendered)

    def _conversation_turn(self, index: int, message: ChatMessage) -> dict[str, Any]:
        if not _ROLE.fullmatch(message.role):
            text = f"messages[{index}].role must be a lower-case word such as user, assistant or system"
            raise InvalidRequestError(text, field=f"messages[{index}].role")
        if self._image is None:
            texts = [part for part in message.parts if isinstance(part, str)]
            return {"role": message.role, "content": self._guarded.guard("".join(texts))}
        return {"role": message.role, "content": [self._content(part) for part in message.parts]}

    def _content(self, part: Part) -> dict[str, str]:
        if isinstance(part, str):
            return {"type": "text", "text": self._guarded.guard(part)}
        return {"type": "image" if isinstance(part, ImageSlot) else "video"}

    def scoring_ids(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """The text that methods which ask about the question rank visual tokens by.

        It is the text of the last user message that has any, without what the template puts around it; its pieces
        are joined by line breaks. At most the first 512 tokens count. Empty if no user message has text.
        """
        for message in reversed(messages):
            text = "\n".join(part for part in message.parts if isinstance(part, str))
            if message.role == "user" and text.strip():
                return tuple(self._guarded.encode_plain(text, add_special_tokens=False)[:SCORING_TOKENS_MAX])
        return ()

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a raw completion prompt, with the BOS the tokenizer adds; control strings are plain text."""
        return self._guarded.encode_plain(text, add_special_tokens=True)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:  # noqa: FBT001, FBT002 - as transformers'
        """Text of token ids; ids beyond the tokenizer's vocabulary give none."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )


def _chat_template(directory: Path, tokenizer: TokenizersBackend) -> str | None:
    """The conversation template: ``chat_template.jinja``, the processor's older JSON file, or the tokenizer's own."""
    jinja, legacy = directory / "chat_template.jinja", directory / "chat_template.json"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    if legacy.is_file():
        return str(read_json(legacy)["chat_template"])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None
