"""What image recipes are made of: the checkpoint's processor and tokenizer, and the recipe of a fixed grid."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import ImageLayout
from prismserve.models.checkpoint import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from PIL import Image
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    from prismserve.models.base import ImageShape, ImageTools


class CheckpointTools:
    """See :class:`prismserve.models.base.ImageTools`."""

    def __init__(self, directory: Path, tokenizer: TokenizersBackend) -> None:
        """Read from a checkpoint directory whose tokenizer is loaded."""
        self._directory = directory
        self._tokenizer = tokenizer

    @functools.cached_property
    def image_processor(self) -> Any:
        """The checkpoint's own image processor; ModelLoadError if it cannot be loaded."""
        # Imported here: it pulls in scientific libraries that a router, which only counts, can do without.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        try:
            # Pixels must be the same on every worker, so the choice does not depend on what else is installed.
            return AutoImageProcessor.from_pretrained(self._directory, local_files_only=True, backend="pil")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"the image processor of {self._directory} cannot be loaded: {error}"
            raise ModelLoadError(message, field="model") from error

    def token_ids(self, text: str) -> list[int]:
        """Ids of text the family wrote; control tokens in it are control tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def token_text(self, token_id: int) -> str:
        """Spelling of a token; ModelLoadError if the tokenizer has none."""
        text = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(text, str):
            message = f"the tokenizer of {self._directory} has no token {token_id} for images"
            raise ModelLoadError(message, field="model")
        return text

    def token_id(self, text: str) -> int:
        """Id of a token; ModelLoadError if the tokenizer has none of this spelling."""
        token_id = self._tokenizer.get_vocab().get(text)
        if token_id is None:
            message = f"the tokenizer of {self._directory} has no token {text!r}"
            raise ModelLoadError(message, field="model")
        return int(token_id)

    def settings(self) -> Mapping[str, Any]:
        """What ``processor_config.json`` says about the processor as a whole; empty if there is none."""
        path = self._directory / "processor_config.json"
        return read_json(path) if path.is_file() else {}

    def video_settings(self) -> Mapping[str, Any]:
        """What the checkpoint says about its video processor, from the file transformers would read."""
        nested = self.settings().get("video_processor")
        if nested is not None:
            return dict(nested)
        paths = (self._directory / name for name in ("video_preprocessor_config.json", "preprocessor_config.json"))
        return next((read_json(path) for path in paths if path.is_file()), {})


class Recipe:
    """The parts most recipes share; see :class:`prismserve.models.base.ImageRecipe`."""

    before = ""
    after = ""

    def __init__(self, shape: ImageShape, tools: ImageTools) -> None:
        """Read images of ``shape`` with what ``tools`` gives."""
        self.shape = shape
        self.tools = tools
        self.placeholder_id = self.image_token_id = shape.image_token_id

    def splits(self) -> bool:
        """Whether an image that is alone is treated differently from one among others: no."""
        return False

    def processed(self, images: Sequence[Image.Image], *names: str, **options: Any) -> dict[str, torch.Tensor]:
        """The named results of the checkpoint's image processor for the images of one sample.

        Raises:
            ModelLoadError: it gives none of such a name.
        """
        result = self.tools.image_processor(images=[list(images)], return_tensors="pt", **options)
        missing = [name for name in names if name not in result]
        if missing:
            message = f"the image processor {type(self.tools.image_processor).__name__} gives no {', '.join(missing)}"
            raise ModelLoadError(message, field="model")
        return {name: result[name] for name in names}


class FixedGrid(Recipe):
    """Every image is resized to the encoder's size and becomes the same grid of tokens."""

    def layout(self, height_px: int, width_px: int, *, alone: bool) -> ImageLayout:  # noqa: ARG002 - always the same
        """The grid of the shape."""
        return ImageLayout(self.shape.tokens, self.shape.grid)

    def tensors(self, image: Image.Image, *, alone: bool) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """``pixel_values`` [1, 3, height_px, width_px]; ModelLoadError if the processor gives another size."""
        tensors = self.processed([image], "pixel_values")
        given = list(tensors["pixel_values"][0].shape)
        expected = [3, self.shape.height_px, self.shape.width_px]
        if given != expected:
            message = f"the image processor gives {given} pixels, the vision tower takes {expected}"
            raise ModelLoadError(message, field="model")
        return tensors
