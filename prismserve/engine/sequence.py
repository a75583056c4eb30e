"""The private, mutable state of one request inside the engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from prismserve.core.errors import EngineError
from prismserve.core.prompt import Element, block_key, block_keys, elements
from prismserve.core.types import MediaSegment, TextSegment
from prismserve.engine.sampler import is_plain

if TYPE_CHECKING:
    from collections.abc import Sequence as Items

    from prismserve.core.types import Request
    from prismserve.engine.constraints import Matcher
    from prismserve.engine.focusing import Focusing
    from prismserve.engine.image_cache import VisualTokens
    from prismserve.engine.pruning import Pruning
    from prismserve.engine.ragged import Compaction, LayerTable
    from prismserve.engine.sampler import TokenBias, TokenCounts
    from prismserve.engine.swap import SwappedKV
    from prismserve.engine.taps import Taps


class Work(enum.StrEnum):
    """What a sequence is here for."""

    LOCAL = "local"
    PREFILL = "prefill"
    IMPORT = "import"


class State(enum.StrEnum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    EXPORTING = "exporting"
    IMPORTING = "importing"


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where one image lies in a sequence.

    Attributes:
        segment: the prompt's segment.
        start: its first cache slot.
        position: position of its first raw token.
    """

    segment: MediaSegment
    start: int
    position: int

    @property
    def end(self) -> int:
        """One past its last cache slot."""
        return self.start + self.segment.tokens


@dataclass(slots=True)
class Timings:
    """Moments on the engine's clock in seconds, and time spent."""

    submitted: float
    started: float | None = None
    encode_s: float = 0.0
    images_encoded: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens, positions and block table.

    ``cached`` slots of the sequence are computed; ``length`` are known (prompt, then generated). One ``table`` of groups
    serves every layer while all layers keep the same tokens. Once a layer was compacted, ``ragged`` has a table per
    layer, and ``table`` only the whole groups that some layer still shares. ``compactions`` were done to the KV held,
    ``replay`` are still to be done to it because it is being computed again. ``swapped`` is the KV of a preempted
    sequence in host memory. What is ``streamed`` is read by an export layer by layer and must not be compacted.
    ``pruning`` are the cuts of a prefill method; the ``keys`` of such a sequence end with the text before its first image.
    ``focusing`` is a visual method's choice of what decoding reads; the ``keys`` of such a sequence end with its prompt.
    ``first_position`` is that of the first generated token. ``plain`` requests choose greedily without further options.
    """

    order: int
    request: Request
    work: Work
    namespace: bytes
    timings: Timings
    state: State = State.WAITING
    slots: list[Element] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    cached: int = 0
    published: int = 0
    publishable: bool = True
    ragged: list[LayerTable] | None = None
    compactions: list[Compaction] = field(default_factory=list)
    replay: list[Compaction] = field(default_factory=list)
    swapped: SwappedKV | None = None
    taps: Taps | None = None
    pruning: Pruning | None = None
    focusing: Focusing | None = None
    prefix_tokens: int = 0
    images: dict[bytes, VisualTokens] = field(default_factory=dict)
    spans: tuple[ImageSpan, ...] = ()
    first_position: int = 0
    ids: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    counts: TokenCounts | None = None
    streamed: bool = False
    bias: TokenBias | None = None
    matcher: Matcher | None = None
    plain: bool = False
    reported: bool = False
    ended: bool = False

    @classmethod
    def create(
        cls, order: int, request: Request, work: Work, namespace: bytes, block_tokens: int, now: float
    ) -> Sequence:
        """Lay out a request: its elements, block keys and image spans."""
        slots = elements(request.prompt, request.resume_token_ids)
        spans: list[ImageSpan] = []
        start = position = 0
        for segment in request.prompt.segments:
            if isinstance(segment, MediaSegment):
                spans.append(ImageSpan(segment, start, position))
            start += segment.tokens
            position += segment.positions
        return cls(
            order=order,
            request=request,
            work=work,
            namespace=namespace,
            timings=Timings(now),
            slots=slots,
            keys=block_keys(namespace, slots, block_tokens),
            spans=tuple(spans),
            first_position=request.prompt.next_position,
            generated=list(request.resume_token_ids),
            plain=is_plain(request.sampling),
        )

    @property
    def identity(self) -> tuple[str, int]:
        """Request id and attempt."""
        return self.request.request_id, self.request.attempt

    @property
    def length(self) -> int:
        """Cache slots known, computed or not."""
        return len(self.slots)

    @property
    def uncomputed(self) -> int:
        """Known slots without KV; the last one's computation yields logits."""
        return len(self.slots) - self.cached

    @property
    def computable(self) -> int:
        """Known slots without KV that can be computed in one go."""
        return self.computable_from(self.cached)

    def computable_from(self, cached: int) -> int:
        """Slots that can be computed in one go behind ``cached`` ones.

        A compaction to be repeated ends the run, and so does the end of each stage of a prompt under a prefill method.
        Where a method chooses what decoding reads, every token behind the prompt is a run of its own.
        """
        end = self.length if not self.replay else self.replay[0].at
        if self.focusing is not None:
            end = min(end, max(self.prompt_tokens, cached + 1))
        return (end if self.pruning is None else min(end, self.pruning.stop(cached))) - cached

    @property
    def staged(self) -> bool:
        """Whether the next slot belongs to a prompt that passes through cuts."""
        return self.pruning is not None and self.pruning.staged(self.cached)

    @property
    def match_limit(self) -> int:
        """Leading slots whose KV may come from a cache.

        The last known token yields the logits, tapped tokens yield their queries, and a compaction to be repeated
        follows the computation of at least one token.
        """
        limit = self.length - 1
        if self.replay:
            limit = min(limit, self.replay[0].at - 1)
        if self.pruning is not None:
            limit = min(limit, self.pruning.base)
        if self.focusing is not None:
            limit = min(limit, self.prompt_tokens)
        return limit if self.taps is None else min(limit, self.taps.first_slot(self.length))

    @property
    def shareable(self) -> int:
        """Leading slots whose KV others may use, once it is computed."""
        return self.length if self.focusing is None else self.prompt_tokens

    @property
    def prompt_tokens(self) -> int:
        """Cache slots of the prompt without generated tokens."""
        return len(self.slots) - len(self.generated)

    @property
    def next_position(self) -> int:
        """Position of the next token to be generated."""
        return self.first_position + len(self.generated)

    @property
    def context_tokens(self) -> int:
        """Tokens of prompt and answer as the model's context counts them, before compression."""
        return self.request.prompt.raw_tokens + len(self.generated)

    @property
    def deadline(self) -> float:
        """When the request's time is up, on the engine's clock."""
        return self.timings.submitted + self.request.timeout_s

    def append(self, token: int, block_tokens: int) -> None:
        """Add a generated token; extends the key chain when a block's elements become complete."""
        self.slots.append(token)
        self.generated.append(token)
        if self.pruning is None and self.focusing is None and len(self.slots) % block_tokens == 0:
            parent = self.keys[-1] if self.keys else self.namespace
            self.keys.append(block_key(parent, self.slots[-block_tokens:]))

    def prune(self, pruning: Pruning | None, block_tokens: int) -> None:
        """Put the prompt under a prefill method, before anything was allocated."""
        self.pruning = pruning
        if pruning is not None:
            self.keys = self.keys[: pruning.base // block_tokens]

    def focus(self, focusing: Focusing | None, block_tokens: int) -> None:
        """Put decoding under a method that chooses what it reads, before anything was allocated."""
        self.focusing = focusing
        if focusing is not None:
            self.keys = self.keys[: self.prompt_tokens // block_tokens]

    def advance(self, tokens: int, layer_counts: Items[int] | None = None) -> None:
        """``tokens`` more slots are computed; ``layer_counts`` of them hold KV in each layer, all if it is None."""
        self.cached += tokens
        if self.taps is not None:
            self.taps.advance(self.cached)
        for layer, table in enumerate(self.ragged or ()):
            table.tokens += tokens if layer_counts is None else layer_counts[layer]

    def layer_tokens(self, layers: int) -> tuple[int, ...]:
        """Slots that hold KV in each of ``layers`` layers."""
        if self.ragged is None:
            return (self.cached,) * layers
        return tuple(table.tokens for table in self.ragged)

    def missing_images(self, cached_tokens: int) -> list[ImageSpan]:
        """Images with slots beyond ``cached_tokens`` whose embeddings the sequence does not hold, each key once."""
        seen: dict[bytes, ImageSpan] = {}
        for span in self.spans:
            if span.end > cached_tokens and span.segment.key not in self.images:
                seen.setdefault(span.segment.key, span)
        return list(seen.values())

    def prepare_inputs(self) -> None:
        """Build ``ids`` and ``positions`` of all known slots: [length] int64 each.

        Positions are [3, length] where those of an image have three components (time, row, column). Image slots have
        id 0, and position -1 where the image's embeddings are not held because its slots are cached.
        """
        ids = torch.zeros(self.length, dtype=torch.int64)
        components = any(visual.positions.dim() > 1 for visual in self.images.values())
        positions = torch.full((3, self.length) if components else (self.length,), -1, dtype=torch.int64)
        start = position = 0
        for segment in self.request.prompt.segments:
            if isinstance(segment, TextSegment):
                ids[start : start + segment.tokens] = torch.tensor(segment.token_ids, dtype=torch.int64)
                positions[..., start : start + segment.tokens] = torch.arange(position, position + segment.tokens)
            else:
                visual = self.images.get(segment.key)
                if visual is not None:
                    self._check_visual(segment, visual)
                    positions[..., start : start + segment.tokens] = visual.positions + position
            start += segment.tokens
            position += segment.positions
        if self.generated:
            ids[start:] = torch.tensor(self.generated, dtype=torch.int64)
            positions[..., start:] = torch.arange(self.first_position, self.next_position)
        self.ids, self.positions = ids, positions

    def reset(self) -> None:
        """Forget all computed KV (its blocks must have been released) so that the sequence is computed again."""
        self.table = []
        self.replay = self.compactions + self.replay
        self.compactions = []
        self.cached = self.published = 0
        if self.taps is not None:
            self.taps.reset()
        self.ids = self.positions = None
        self.state = State.WAITING
        if self.pruning is not None:
            self.pruning.restart()
        if self.focusing is not None:
            self.focusing.restart()

    def images_within(self, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """(first, end) slots of the images that overlap [start, end)."""
        return tuple((span.start, span.end) for span in self.spans if start < span.end and span.start < end)

    def whole_images(self, start: int, tokens: int) -> int:
        """How many slots from ``start`` on to compute, about ``tokens``, so that no image is cut.

        The chunk ends before an image it would cut, or, where it would be empty, with that image.
        """
        end = start + tokens
        for span in self.spans:
            if span.start < end < span.end:
                return span.start - start if span.start > start else span.end - start
        return tokens

    def embeds(self, start: int, end: int) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Image embeddings that fill slots in [start, end).

        Returns:
            Rows relative to ``start`` ([n] int64, None if there are none) and the pieces to put there, in order.
        """
        rows: list[torch.Tensor] = []
        pieces: list[torch.Tensor] = []
        for span in self.spans:
            first, last = max(start, span.start), min(end, span.end)
            if first < last:
                rows.append(torch.arange(first - start, last - start))
                pieces.append(self.images[span.segment.key].embeds[first - span.start : last - span.start])
        return (torch.cat(rows), pieces) if rows else (None, [])

    def _check_visual(self, segment: MediaSegment, visual: VisualTokens) -> None:
        kept = visual.embeds.shape[0]
        if (kept, visual.raw_tokens) != (segment.tokens, segment.raw_tokens):
            message = (
                f"image {segment.media_index} gave {kept} of {visual.raw_tokens} visual tokens, "
                f"the prompt has room for {segment.tokens} of {segment.raw_tokens}"
            )
            raise EngineError(message, request_id=self.request.request_id)
