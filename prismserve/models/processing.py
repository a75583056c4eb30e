"""Text and pictures to token ids and pixels, and back. Needs no weights: routers use it as well as workers."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from jinja2 import TemplateError
from transformers.models.auto.tokenization_auto import AutoTokenizer

from prismserve.core.errors import InvalidRequestError, ModelLoadError
from prismserve.core.hashing import canonical_json, digest
from prismserve.models.base import ImageInputs
from prismserve.models.checkpoint import read_checkpoint, read_json
from prismserve.models.detokenizer import IncrementalDetokenizer
from prismserve.models.images import CheckpointTools
from prismserve.models.tokenization import GuardedTokenizer

if TYPE_CHECKING:
    from PIL import Image
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    from prismserve.models.base import ImageLayout, ImageRecipe
    from prismserve.models.checkpoint import Checkpoint

__all__ = ["ChatMessage", "ImageSlot", "IncrementalDetokenizer", "Part", "Processor"]

SCORING_TOKENS_MAX: Final = 512
"""Longest text a question is ranked by, in tokens."""
_ROLE: Final = re.compile(r"[a-z][a-z_]{0,31}")
_IMAGE_FILES: Final = ("preprocessor_config.json", "processor_config.json")
_PIXEL_MODES: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of image ``index`` of the request, in a message or among token ids."""

    index: int


Part: TypeAlias = str | ImageSlot


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message: a role (``system``, ``user``, ``assistant``) and its texts and images in order."""

    role: str
    parts: tuple[Part, ...]


class Processor:
    """Tokenizer, chat template and image preprocessing of one checkpoint; thread-safe.

    Attributes:
        tokenizer: the checkpoint's own tokenizer.
        eos_token_ids: any of them ends generation.
        image_token_id: what fills the slots of an image, None for a text-only model.
        max_model_len: usable context in tokens.
        vocab_size: width of the model's logits; may exceed the tokenizer's vocabulary.
        fingerprint: 32 bytes over all that decides which pixels an image becomes, and how many tokens.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: TokenizersBackend) -> None:
        self._checkpoint = checkpoint
        self._image = checkpoint.shape.image
        self.tokenizer = tokenizer
        self.eos_token_ids = checkpoint.eos_token_ids or frozenset(
            () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        )
        self.max_model_len = checkpoint.shape.decoder.max_position_embeddings
        self.vocab_size = checkpoint.shape.decoder.vocab_size
        self.image_token_id = self._image.image_token_id if self._image else None
        self._tools = CheckpointTools(checkpoint.directory, tokenizer)
        self._guarded = GuardedTokenizer(tokenizer, self._placeholders())
        self._template = _chat_template(checkpoint.directory, tokenizer)
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

    def _fingerprint(self) -> bytes:
        if self._image is None:
            return digest("processor")
        directory = self._checkpoint.directory
        files = {name: read_json(directory / name) for name in _IMAGE_FILES if (directory / name).is_file()}
        size = [self._image.height_px, self._image.width_px, *self._image.grid]
        return digest("processor", canonical_json(files), canonical_json(size))

    @functools.cached_property
    def _recipe(self) -> ImageRecipe:
        if self._image is None:
            message = "this model reads text only; remove the images"
            raise InvalidRequestError(message, field="messages")
        return self._checkpoint.family.images(self._checkpoint.config, self._image, self._tools)

    @functools.cached_property
    def _framing(self) -> tuple[str, str]:
        """What a template writes for an image, and what is tokenized there: the image token in the family's frame."""
        recipe = self._recipe
        image = self._tools.token_text(recipe.image_token_id)
        return self._tools.token_text(recipe.placeholder_id), f"{recipe.before}{image}{recipe.after}"

    def _placeholders(self) -> frozenset[str]:
        """Spellings of the tokens that stand for images, in the token ids or in a template."""
        if self._image is None:
            return frozenset()
        ids = (self._image.image_token_id, self._recipe.placeholder_id)
        return frozenset(self._tools.token_text(token_id) for token_id in ids)

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
    def reducible(self) -> frozenset[str] | None:
        """What a method that reduces visual tokens may ask of the encoder; None where no method may act."""
        return self._image.reducible if self._image else None

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

    def render_chat(self, messages: Sequence[ChatMessage]) -> list[int | ImageSlot]:
        """Token ids of a conversation by the checkpoint's template, ready for the assistant's next turn.

        Args:
            messages: at least one. Control-token strings inside their texts are tokenized as plain text.

        Returns:
            Token ids with one :class:`ImageSlot` per image, not expanded.

        Raises:
            InvalidRequestError: no template, a role or order of roles the template refuses, or images for a model
                that takes none.
        """
        slots = [part for message in messages for part in message.parts if isinstance(part, ImageSlot)]
        if slots and self._image is None:
            message = "this model reads text only; remove the images"
            raise InvalidRequestError(message, field="messages")
        rendered = self._render(messages)
        if slots:
            rendered = rendered.replace(*self._framing)
        ids = self._guarded.encode_rendered(rendered, add_special_tokens=self._adds_special_tokens(rendered))
        placed = ids.count(self.image_token_id) if self.image_token_id is not None else 0
        if placed != len(slots):
            message = f"the model's chat template places {placed} of {len(slots)} images; put images in user messages"
            raise InvalidRequestError(message, field="messages")
        remaining = iter(slots)
        return [next(remaining) if token_id == self.image_token_id else token_id for token_id in ids]

    def _adds_special_tokens(self, rendered: str) -> bool:
        """Whether the tokenizer's own BOS and EOS go around a rendered chat, as transformers decides it.

        A tokenizer leaves all to its template; a multimodal processor only where the template wrote a BOS.
        """
        bos = self.tokenizer.bos_token
        return self.supports_images and not (bos is not None and rendered.startswith(bos))

    def _render(self, messages: Sequence[ChatMessage]) -> str:
        if self._template is None:
            message = "this model has no chat template; use /v1/completions"
            raise InvalidRequestError(message, field="messages")
        conversation = [self._conversation_turn(index, message) for index, message in enumerate(messages)]
        try:
            rendered = self.tokenizer.apply_chat_template(
                conversation, chat_template=self._template, tokenize=False, add_generation_prompt=True
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
        content = [
            {"type": "text", "text": self._guarded.guard(part)} if isinstance(part, str) else {"type": "image"}
            for part in message.parts
        ]
        return {"role": message.role, "content": content}

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
