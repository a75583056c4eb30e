"""From encoded image files to decoder inputs: decode, preprocess, encode, compress, project."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

from prismserve.compression.apply import apply_visual
from prismserve.compression.base import VisualFeatures
from prismserve.compression.loader import visual_method
from prismserve.core.errors import EngineError, InvalidRequestError
from prismserve.engine.image_cache import VisualTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from prismserve.core.types import MediaInput, MethodSpec
    from prismserve.engine.image_cache import ImageCache
    from prismserve.models.base import VisionLanguageModel
    from prismserve.models.processing import Processor

_SEED_BYTES = 8


class VisionPipeline:
    """Encodes images into the image cache and counts what it did.

    Attributes:
        encoded: images encoded.
    """

    def __init__(self, model: VisionLanguageModel, processor: Processor, cache: ImageCache) -> None:
        """Encode with ``model``; results are shared through ``cache``."""
        self._model = model
        self._processor = processor
        self._cache = cache
        self.encoded = 0

    def pixels(self, media: MediaInput, index: int) -> torch.Tensor:
        """Decode and preprocess one image; InvalidRequestError if the file does not decode to what was said."""
        try:
            with Image.open(io.BytesIO(media.data)) as image:
                if image.size != (media.width_px, media.height_px):
                    message = (
                        f"image {index} is {image.width}x{image.height} pixels, "
                        f"the request says {media.width_px}x{media.height_px}"
                    )
                    raise InvalidRequestError(message, field="media")
                image.load()
                return self._processor.preprocess(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            message = f"image {index} cannot be decoded: {error}"
            raise InvalidRequestError(message, field="media") from error

    def encode(
        self, keys: Sequence[bytes], media: Sequence[MediaInput], pixels: Sequence[torch.Tensor], spec: MethodSpec
    ) -> list[VisualTokens]:
        """Encode, reduce and project a batch of images under one visual method.

        Args:
            keys: ``MediaSegment.key`` of each image.
            media: the images, for their seeds.
            pixels: from :meth:`pixels`.
            spec: normalised visual method.

        Returns:
            One entry per image, also put into the cache.
        """
        needs = visual_method(spec.name).needs
        encoded = self._model.encode_images(pixels, frozenset(str(need) for need in needs))
        if len(encoded) != len(keys):
            message = f"the vision encoder gave {len(encoded)} results for {len(keys)} images"
            raise EngineError(message)
        results: list[VisualTokens] = []
        for key, item, image in zip(keys, media, encoded, strict=True):
            features = VisualFeatures(
                tokens=image.tokens,
                grid=image.grid,
                seed=item.pixel_hash[:_SEED_BYTES],
                cls_attention=image.cls_attention,
                keys=image.keys,
            )
            tokens, indices = apply_visual(features, spec)
            visual = VisualTokens(self._model.project(tokens), indices.cpu(), image.tokens.shape[0])
            self._cache.put(key, visual)
            results.append(visual)
        self.encoded += len(results)
        return results
