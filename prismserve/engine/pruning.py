"""Which visual tokens of a sequence leave between decoder layers: what is known beforehand, and how far it has come.

A sequence under a prefill method is ragged from the start and goes through three stages:

1. Whole blocks of text before its first image are computed in every layer, and shared through the prefix cache.
2. The rest of the prompt is computed in chunks below the *entry* layer only; what enters that layer is held. With the
   prompt's last chunk the entry layer and all above it run over the whole rest at once, so that every cut sees the
   whole prompt, however it was chunked and whoever else was in the batch.
3. Tokens after the prompt, resumed ones too, are ordinary tokens of a ragged sequence.

So what is chosen is a function of the prompt alone, before and after a preemption or a migration.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prismserve.compression import loader
from prismserve.compression.cuts import Cut, Grid, Tap
from prismserve.core.errors import InvalidRequestError
from prismserve.core.hashing import digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from prismserve.compression.cuts import CutPlan, PrefillMethod
    from prismserve.core.types import MediaSegment, Request
    from prismserve.engine.sequence import ImageSpan
    from prismserve.models.base import ImageLayout
    from prismserve.models.config import DecoderConfig
    from prismserve.models.processing import Processor

_FIELD = "compression.prefill"
_SEED_BYTES = 8
_NEVER = 1 << 62


@dataclass(slots=True, eq=False)
class Pruning:
    """The cuts of one sequence.

    Attributes:
        method: what chooses.
        config: its configuration.
        cuts: in order, at the layers this decoder allows.
        entry: first layer that runs over the whole rest of the prompt at once.
        base: leading slots, a whole number of blocks of text, that are computed in every layer beforehand.
        prompt_tokens: slots of the prompt.
        room: slots each layer holds of the prompt at most; exact where the method's counts are.
        grids: one per image or video.
        rasters: of each, the slots that stand in its frames, ascending; None if all do. What stands around them is
            treated as text is: no method sees it, and it stays.
        seed: 8 bytes from all pixels.
        counts: visual tokens of each image or video as they enter the decoder.
        held: [t, D] pieces of what enters the entry layer, in order, of the chunks computed so far.
        plans: what was chosen, by cut; kept when the sequence is computed again, so that the choice is the same.
        kept: visual tokens behind each cut that was made.
    """

    method: PrefillMethod
    config: Any
    cuts: tuple[Cut, ...]
    entry: int
    base: int
    prompt_tokens: int
    room: tuple[int, ...]
    grids: tuple[Grid, ...]
    rasters: tuple[torch.Tensor | None, ...]
    seed: bytes
    counts: tuple[int, ...]
    held: list[torch.Tensor] = field(default_factory=list)
    plans: dict[int, CutPlan] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)

    def stop(self, cached: int) -> int:
        """The slot at which a chunk that starts at ``cached`` must end at the latest."""
        if cached < self.base:
            return self.base
        return self.prompt_tokens if cached < self.prompt_tokens else _NEVER

    def staged(self, cached: int) -> bool:
        """Whether slot ``cached`` is computed below the entry layer first."""
        return self.base <= cached < self.prompt_tokens

    def restart(self) -> None:
        """All KV was given up: the prompt is computed again."""
        self.held.clear()
        self.kept.clear()

    def accepts(self, layer_tokens: Sequence[int], length: int) -> bool:
        """Whether a prompt of ``length`` slots, resumed tokens included, can have left so many in each layer."""
        extra = length - self.prompt_tokens
        text = length - self.visual_tokens
        if len(layer_tokens) != len(self.room):
            return False
        first = self.cuts[0].layer if self.cuts else len(self.room)
        for layer, (tokens, room) in enumerate(zip(layer_tokens, self.room, strict=True)):
            least = room + extra if self.method.exact or layer < first else text
            if not least <= tokens <= room + extra:
                return False
        return True

    @property
    def visual_tokens(self) -> int:
        """Visual tokens that enter the decoder."""
        return sum(self.counts)


def plan_pruning(
    request: Request, spans: Sequence[ImageSpan], decoder: DecoderConfig, processor: Processor, block_tokens: int
) -> Pruning | None:
    """The cuts a request asks for; None if it asks for none or has no image.

    Raises:
        InvalidRequestError: the model, its images or its layers do not allow them.
    """
    spec = request.compression.prefill
    if spec.name == "none" or not spans:
        return None
    method, config = loader.prefill_method(spec.name), loader.config_of(spec, "prefill")
    reduced = any(span.segment.tokens < span.segment.raw_tokens for span in spans)
    prunable = processor.prunable_of({item.kind for item in request.media})
    if not prunable or (method.whole and reduced):
        what = (
            "needs every token of an image" if method.whole and reduced else "cannot act on this model's visual tokens"
        )
        message = f"{_FIELD}: method {method.name!r} {what}"
        raise InvalidRequestError(message, field=_FIELD)
    cuts = fitted(method.cuts(config, decoder.layers), decoder)
    layouts = tuple(_layout(processor, request, span.segment) for span in spans)
    around = (layout.tokens - layout.raster_tokens for layout in layouts)
    counts = tuple(span.segment.tokens - others for span, others in zip(spans, around, strict=True))
    visual, prompt = sum(counts), request.prompt.tokens
    room = [prompt] * decoder.layers
    for cut, kept in zip(cuts, method.kept_tokens(config, decoder.layers, visual), strict=True):
        room[cut.layer :] = [prompt - visual + kept] * (decoder.layers - cut.layer)
    first = cuts[0].layer if cuts else decoder.layers
    return Pruning(
        method=method,
        config=config,
        cuts=cuts,
        entry=first - (bool(cuts) and cuts[0].tap is Tap.BEFORE),
        base=spans[0].start // block_tokens * block_tokens,
        prompt_tokens=prompt,
        room=tuple(room),
        grids=tuple(Grid(layout.frames, *layout.grid) for layout in layouts),
        rasters=tuple(layout.raster for layout in layouts),
        seed=digest("prune-seed", *(media.pixel_hash for media in request.media))[:_SEED_BYTES],
        counts=counts,
    )


def fitted(cuts: Sequence[Cut], decoder: DecoderConfig) -> tuple[Cut, ...]:
    """Cuts moved behind the layers into which a decoder feeds parts of the image, which need all of its tokens.

    Raises:
        InvalidRequestError: too few layers are left.
    """
    moved: list[Cut] = []
    for cut in cuts:
        first = decoder.deepstack_layers + (cut.tap is Tap.BEFORE and decoder.deepstack_layers > 0)
        layer = max(cut.layer, moved[-1].layer + 1 if moved else first)
        if layer >= decoder.layers:
            message = f"{_FIELD}: {len(cuts)} cuts do not fit the {decoder.layers} layers of this model"
            raise InvalidRequestError(message, field=_FIELD)
        moved.append(dataclasses.replace(cut, layer=layer))
    return tuple(moved)


def _layout(processor: Processor, request: Request, segment: MediaSegment) -> ImageLayout:
    item = request.media[segment.media_index]
    if item.times is None:
        layout = processor.image_layout(item.width_px, item.height_px, images=len(request.media))
    else:
        layout = processor.video_layout(item.width_px, item.height_px, item.times)
    if layout.raster is not None and layout.positions is not None:
        message = f"{_FIELD}: text stands between the frames of this video, which no method can leave in place yet"
        raise InvalidRequestError(message, field=_FIELD)
    return layout
