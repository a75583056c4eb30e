"""From image files and frames of videos to decoder inputs: decode, preprocess, encode, compress, project."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from prismserve.compression.apply import carry_out, plan_visual
from prismserve.compression.base import BESIDE_THE_MODEL, Need, VisualFeatures
from prismserve.compression.loader import config_of, encoder_needs, visual_method
from prismserve.core.errors import EngineError, InvalidRequestError
from prismserve.core.types import MediaKind
from prismserve.engine.image_cache import NO_LABEL, VisualTokens
from prismserve.engine.questioning import QuestionAttention
from prismserve.models.code_attention import CodeAttention
from prismserve.models.context_branch import ContextBranch
from prismserve.models.text_tower import TextTower
from prismserve.models.token_selector import TokenSelector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.compression.base import Asked, VisualPlan, Written
    from prismserve.core.types import MediaInput, MethodSpec
    from prismserve.engine.image_cache import ImageCache, ImageLabel
    from prismserve.models.base import EncodedImage, ImageInputs, ImageLayout, VisionLanguageModel
    from prismserve.models.processing import Processor

_SEED_BYTES = 8


class VisionPipeline:
    """Encodes images and videos into the image cache and counts what it did.

    Attributes:
        encoded: images and videos encoded.
    """

    def __init__(self, model: VisionLanguageModel, processor: Processor, cache: ImageCache) -> None:
        """Encode with ``model``; results are shared through ``cache``.

        Raises:
            ModelLoadError: weights that lie beside the checkpoint's own cannot be loaded.
        """
        self._model = model
        self._processor = processor
        self._cache = cache
        self._tower = None if processor.text_tower is None else TextTower(processor.text_tower, model.device)
        self._selector = None
        if processor.token_selector is not None:
            vocabulary = len(processor.tokenizer)
            self._selector = TokenSelector(processor.token_selector, vocabulary, model.device, model.decoder.dtype)
        self._codes = None
        if processor.code_attention is not None:
            patches, width = processor.frame_patches, model.decoder.config.hidden_size
            self._codes = CodeAttention(processor.code_attention, patches, width, model.device)
        self._context = None
        if processor.context_branch is not None:
            width = model.decoder.config.hidden_size
            self._context = ContextBranch(processor.context_branch, width, model.device)
        self.encoded = 0

    def inputs(self, media: Sequence[MediaInput], index: int) -> ImageInputs:
        """Decode and preprocess item ``index`` of a request; InvalidRequestError if it is not what was said."""
        entry = media[index]
        if entry.times is not None:
            shape = (entry.frames, entry.height_px, entry.width_px, 3)
            if len(entry.data) != math.prod(shape):
                message = f"video {index} has {len(entry.data)} bytes, its size asks for {math.prod(shape)}"
                raise InvalidRequestError(message, field="media")
            frames = np.frombuffer(entry.data, np.uint8).reshape(shape)
            return self._processor.preprocess_video(frames, entry.times)
        images = sum(item.kind is MediaKind.IMAGE for item in media)
        try:
            with Image.open(io.BytesIO(entry.data)) as image:
                if image.size != (entry.width_px, entry.height_px):
                    message = (
                        f"image {index} is {image.width}x{image.height} pixels, "
                        f"the request says {entry.width_px}x{entry.height_px}"
                    )
                    raise InvalidRequestError(message, field="media")
                image.load()
                return self._processor.preprocess(image, images=images)
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
        labels: Sequence[ImageLabel] = (),
    ) -> list[VisualTokens]:
        """Encode, reduce and project a batch of images and videos under one visual method.

        Args:
            keys: ``MediaSegment.key`` of each.
            media: the items, for their kinds and seeds.
            inputs: from :meth:`inputs`.
            spec: normalised visual method.
            labels: whose each is and which others it can stand for; may be left out.
            scoring_token_ids: the text each image is looked at for; may be left out where the method asks for none.

        Returns:
            One entry per item, also put into the cache.

        Raises:
            InvalidRequestError: the method cannot act on this model's tokens.
        """
        encoded = self._encoded(media, inputs, spec)
        results: list[VisualTokens] = []
        texts = scoring_token_ids or [()] * len(keys)
        named = labels or [NO_LABEL] * len(keys)
        for key, item, prepared, image, ids, label in zip(keys, media, inputs, encoded, texts, named, strict=True):
            features = self._features(image, prepared.layout, item, spec, ids)
            embeds, indices, order = self._reduced(image, prepared.layout, features, spec)
            places = indices.cpu()
            positions = places if prepared.layout.positions is None else prepared.layout.positions[:, places]
            embeds = _with_deepstack(embeds, image, indices)
            visual = VisualTokens(embeds, positions, image.tokens.shape[0], order)
            self._cache.put(key, visual, label)
            results.append(visual)
        self.encoded += len(results)
        return results

    def seen_box(self, item: MediaInput) -> tuple[float, float, float, float]:
        """The part of an image or frame that the grid of its tokens covers: left, top, right, bottom in pixels."""
        return self._processor.seen_box(item.width_px, item.height_px)

    def plans(
        self,
        media: Sequence[MediaInput],
        inputs: Sequence[ImageInputs],
        spec: MethodSpec,
        scoring_token_ids: tuple[int, ...] = (),
    ) -> list[VisualPlan]:
        """What a visual method chooses of each image and video; nothing is kept.

        Args:
            media: the items.
            inputs: from :meth:`inputs`.
            spec: normalised visual method.
            scoring_token_ids: the text they are looked at for.

        Raises:
            InvalidRequestError: the method cannot act on this model's tokens.
        """
        method, config = visual_method(spec.name), config_of(spec, "visual")
        encoded = self._encoded(media, inputs, spec)
        return [
            method.plan(self._features(image, prepared.layout, item, spec, scoring_token_ids), config)
            for image, prepared, item in zip(encoded, inputs, media, strict=True)
        ]

    def _encoded(
        self, media: Sequence[MediaInput], inputs: Sequence[ImageInputs], spec: MethodSpec
    ) -> list[EncodedImage]:
        """What the encoder gives, with what the method needs of it."""
        needs = encoder_needs(spec.name)
        for kind in {item.kind for item in media} if spec.name != "none" else ():
            reducible = self._processor.reducible_of(kind)
            if reducible is None or needs - reducible:
                message = f"visual method {spec.name!r} cannot act on the {kind} tokens of this model"
                raise InvalidRequestError(message, field="compression.visual")
        encoded = self._model.encode_images(inputs, needs - {str(need) for need in BESIDE_THE_MODEL})
        if len(encoded) != len(inputs):
            message = f"the vision encoder gave {len(encoded)} results for {len(inputs)} images"
            raise EngineError(message)
        return encoded

    def _features(
        self,
        image: EncodedImage,
        layout: ImageLayout,
        media: MediaInput,
        spec: MethodSpec,
        scoring_token_ids: tuple[int, ...],
    ) -> VisualFeatures:
        """What the method of ``spec`` may see of one image or video, and nothing else.

        A method sees the tokens that stand in the raster of a picture or of frames.
        """
        raster = None if layout.raster is None else layout.raster.to(image.tokens.device)
        visible = image.tokens if raster is None else image.tokens[raster]
        needs = visual_method(spec.name).needs
        text = asked = None
        if {Need.TEXT_EMBEDDINGS, Need.QUESTION_ATTENTION} & needs:
            ids = torch.tensor(scoring_token_ids, dtype=torch.int64, device=self._model.device)
            text = self._model.decoder.embed(ids)
        if text is not None and Need.QUESTION_ATTENTION in needs:
            slots = self._model.project(image.tokens)
            asked = QuestionAttention(self._model.decoder, layout, slots, image.deepstack, text)
        aligned = aligned_text = None
        if self._tower is not None and Need.TEXT_TOWER in needs:
            aligned = self._tower.patches(visible)
            aligned_text = self._tower.text(self._processor.decode(scoring_token_ids))
        selected = None
        if self._selector is not None and Need.SELECTOR in needs:
            selected = self._selected(self._selector, image.tokens, layout, scoring_token_ids)
        guided = None
        if self._context is not None and Need.CONTEXT in needs:
            guided = functools.partial(self._context.guide, self._processor.decode(scoring_token_ids))
        return VisualFeatures(
            tokens=visible,
            grid=image.grid,
            seed=media.pixel_hash[:_SEED_BYTES],
            cls_attention=_columns(image.cls_attention, raster),
            keys=_rows(image.keys, raster),
            frames=layout.frames,
            projected=self._model.project(visible) if Need.PROJECTED in needs else None,
            text=text if Need.TEXT_EMBEDDINGS in needs else None,
            asked=asked,
            aligned=aligned,
            aligned_text=aligned_text,
            selected=selected,
            unpooled=image.unpooled,
            coded=self._codes if Need.CODE_ATTENTION in needs else None,
            class_token=None if image.class_token is None else image.class_token[None],
            guided=guided,
        )

    def _selected(
        self, selector: TokenSelector, tokens: torch.Tensor, layout: ImageLayout, scoring_token_ids: tuple[int, ...]
    ) -> Asked:
        """What the selector sees of the slots [n, C] of one image or video when the text is put behind them."""
        ids = torch.tensor(scoring_token_ids, dtype=torch.int64, device=self._model.device)
        # It counts positions one by one, whatever the model's own have.
        plain = dataclasses.replace(layout, positions=None)
        seen = QuestionAttention(selector.decoder, plain, selector.project(tokens), None, selector.decoder.embed(ids))
        return lambda _, reduction: seen(selector.depth, reduction)

    def _reduced(
        self, image: EncodedImage, layout: ImageLayout, features: VisualFeatures, spec: MethodSpec
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What is left of an image or video: decoder inputs [k, D], slots [k] int64 ascending, and the order of keeping.

        What stands around the raster that the method saw is kept; an order is given only where nothing does.
        """
        plan = plan_visual(features, spec)
        if layout.raster is None:
            order = None if plan.order is None else plan.order.cpu()
            if features.projected is not None and plan.weights is None:
                # The method has looked at every token's projection: no need to project the survivors again.
                return features.projected[plan.indices], plan.indices, order
            embeds = self._model.project(carry_out(features.tokens, plan))
            return _overwritten(embeds, plan.written), plan.indices, order
        raster = layout.raster.to(image.tokens.device)
        kept = torch.ones(layout.tokens, dtype=torch.bool, device=raster.device)
        kept[raster] = False
        kept[raster[plan.indices]] = True
        whole = image.tokens.index_copy(0, raster[plan.indices], carry_out(features.tokens, plan))
        embeds, slots = self._model.project(whole[kept]), kept.nonzero()[:, 0]
        return _overwritten(embeds, plan.written, torch.searchsorted(slots, raster[plan.indices])), slots, None


def _overwritten(embeds: torch.Tensor, written: Written | None, places: torch.Tensor | None = None) -> torch.Tensor:
    """Decoder inputs [n, D] with what a method has written itself, where its survivors stand: ``places``, or all rows."""
    if written is None:
        return embeds
    rows = written.rows if places is None else places[written.rows]
    return embeds.index_copy(0, rows, written.embeds.to(embeds))


def _rows(tensor: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None or rows is None else tensor[rows]


def _columns(tensor: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None or columns is None else tensor[:, columns]


def _with_deepstack(embeds: torch.Tensor, image: EncodedImage, indices: torch.Tensor) -> torch.Tensor:
    """[k, D * (1 + n)]: decoder inputs, and beside them what is added to the survivors after the first n layers."""
    if image.deepstack is None:
        return embeds
    return torch.cat((embeds, *image.deepstack[:, indices].to(embeds)), dim=1)
