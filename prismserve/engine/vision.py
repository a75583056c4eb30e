"""From encoded image files to decoder inputs: decode, preprocess, encode, compress, project."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from PIL import Image

from prismserve.compression.apply import apply_visual
from prismserve.compression.base import Need, VisualFeatures
from prismserve.compression.loader import encoder_needs, visual_method
from prismserve.core.errors import EngineError, InvalidRequestError
from prismserve.engine.image_cache import VisualTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.core.types import MediaInput, MethodSpec
    from prismserve.engine.image_cache import ImageCache
    from prismserve.models.base import EncodedImage, ImageInputs, VisionLanguageModel
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

    def inputs(self, media: Sequence[MediaInput], index: int) -> ImageInputs:
        """Decode and preprocess image ``index`` of a request; InvalidRequestError if it is not what was said."""
        entry = media[index]
        try:
            with Image.open(io.BytesIO(entry.data)) as image:
                if image.size != (entry.width_px, entry.height_px):
                    message = (
                        f"image {index} is {image.width}x{image.height} pixels, "
                        f"the request says {entry.width_px}x{entry.height_px}"
                    )
                    raise InvalidRequestError(message, field="media")
                image.load()
                return self._processor.preprocess(image, images=len(media))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            message = f"image {index} cannot be decoded: {error}"
            raise InvalidRequestError(message, field="media") from error

    def encode(
        self,
        keys: Sequence[bytes],
        media: Sequence[MediaInput],
        inputs: Sequence[ImageInputs],
        spec: MethodSpec,
        scoring_token_ids: Sequence[tuple[int, ...]] = (),
    ) -> list[VisualTokens]:
        """Encode, reduce and project a batch of images under one visual method.

        Args:
            keys: ``MediaSegment.key`` of each image.
            media: the images, for their seeds.
            inputs: from :meth:`inputs`.
            spec: normalised visual method.
            scoring_token_ids: the text each image is looked at for; may be left out where the method asks for none.

        Returns:
            One entry per image, also put into the cache.

        Raises:
            InvalidRequestError: the method cannot act on this model's tokens.
        """
        needs = encoder_needs(spec.name)
        reducible = self._processor.reducible
        if spec.name != "none" and (reducible is None or needs - reducible):
            message = f"visual method {spec.name!r} cannot act on the tokens of this model"
            raise InvalidRequestError(message, field="compression.visual")
        encoded = self._model.encode_images(inputs, needs)
        if len(encoded) != len(keys):
            message = f"the vision encoder gave {len(encoded)} results for {len(keys)} images"
            raise EngineError(message)
        results: list[VisualTokens] = []
        texts = scoring_token_ids or [()] * len(keys)
        for key, item, prepared, image, ids in zip(keys, media, inputs, encoded, texts, strict=True):
            features = self._features(image, item, spec, ids)
            tokens, indices = apply_visual(features, spec)
            places = indices.cpu()
            positions = places if prepared.layout.positions is None else prepared.layout.positions[:, places]
            embeds = _with_deepstack(self._model.project(tokens), image, indices)
            visual = VisualTokens(embeds, positions, image.tokens.shape[0])
            self._cache.put(key, visual)
            results.append(visual)
        self.encoded += len(results)
        return results

    def _features(
        self, image: EncodedImage, media: MediaInput, spec: MethodSpec, scoring_token_ids: tuple[int, ...]
    ) -> VisualFeatures:
        """What the method of ``spec`` may see of one image, and nothing else."""
        needs = visual_method(spec.name).needs
        text = None
        if Need.TEXT_EMBEDDINGS in needs:
            ids = torch.tensor(scoring_token_ids, dtype=torch.int64, device=self._model.device)
            text = self._model.decoder.embed(ids)
        return VisualFeatures(
            tokens=image.tokens,
            grid=image.grid,
            seed=media.pixel_hash[:_SEED_BYTES],
            cls_attention=image.cls_attention,
            keys=image.keys,
            projected=self._model.project(image.tokens) if Need.PROJECTED in needs else None,
            text=text,
        )


def _with_deepstack(embeds: torch.Tensor, image: EncodedImage, indices: torch.Tensor) -> torch.Tensor:
    """[k, D * (1 + n)]: decoder inputs, and beside them what is added to the survivors after the first n layers."""
    if image.deepstack is None:
        return embeds
    return torch.cat((embeds, *image.deepstack[:, indices].to(embeds)), dim=1)
