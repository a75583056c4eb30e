"""Which codec each cache slot of a transfer crosses the wire under: images, text and the residual window. Pure.

A request names one codec; its ``residual`` and ``text`` parameters (:class:`prismserve.compression.base.WireConfig`)
say what is excepted from it. Both ends of a transfer derive the same table of codecs from the request's spec, and every
payload says by its place in that table how it was encoded.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prismserve.compression import loader
from prismserve.compression.base import SAME_CODEC, WireConfig
from prismserve.core.errors import UnknownMethodError
from prismserve.core.types import MediaSegment, MethodSpec, Scalar

if TYPE_CHECKING:
    from prismserve.core.types import Prompt

EXACT: Final = loader.normalise(loader.codec("none"), {}, "compression.wire")
CODECS_MAX: Final = 3
"""Most entries of a table: the named codec, that of text, none."""


@dataclass(frozen=True, slots=True)
class Slots:
    """What the cache slots of one layer hold.

    Attributes:
        tokens: how many there are; the residual window ends here.
        visual: [start, end) of every run of visual tokens, ascending, disjoint.
    """

    tokens: int
    visual: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, prompt: Prompt, tokens: int) -> Slots:
        """Of a prompt whose layers all hold ``tokens`` slots (resumed tokens count as text)."""
        spans: list[tuple[int, int]] = []
        at = 0
        for segment in prompt.segments:
            if isinstance(segment, MediaSegment):
                spans.append((at, at + segment.tokens))
            at += segment.tokens
        return cls(tokens, tuple(spans))


@functools.lru_cache(maxsize=256)
def table(spec: MethodSpec) -> tuple[MethodSpec, ...]:
    """The codecs that payloads under a normalised wire spec may use, that of images first, without repeats.

    Raises:
        UnknownMethodError: ``text`` names no codec.
    """
    config = loader.config_of(spec, "codec")
    if not isinstance(config, WireConfig):
        return (spec,)
    found = [spec]
    if config.text != SAME_CODEC:
        found.append(_text_spec(config.text))
    if config.residual:
        found.append(EXACT)
    return tuple(dict.fromkeys(found))


def uniform(spec: MethodSpec) -> MethodSpec:
    """The same codec for every slot: without a residual window and without an exception for text."""
    same: dict[str, Scalar] = {"residual": 0, "text": SAME_CODEC}
    return MethodSpec(spec.name, tuple((name, same.get(name, value)) for name, value in spec.params))


def _text_spec(name: str) -> MethodSpec:
    if name not in loader.names("codec"):
        message = f"unknown codec {name!r} for text; available: {SAME_CODEC}, {', '.join(loader.names('codec'))}"
        raise UnknownMethodError(message, field="compression.wire.text")
    return loader.normalise(loader.codec(name), {}, "compression.wire")


def runs(spec: MethodSpec, slots: Slots | None, start: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Cut a run of slots where the codec changes: (start, tokens, place in :func:`table`).

    ``slots`` None means that nothing is known of them: all of them are encoded as images are.
    """
    codecs, end = table(spec), start + tokens
    if slots is None or len(codecs) == 1:
        if tokens:
            yield start, tokens, 0
        return
    config = loader.config_of(spec, "codec")
    residual, text = (config.residual, config.text) if isinstance(config, WireConfig) else (0, SAME_CODEC)
    of_text = 0 if text == SAME_CODEC else codecs.index(_text_spec(text))
    exact_from = slots.tokens - residual
    edges = {start, end, exact_from, *(edge for span in slots.visual for edge in span)}
    marks = sorted(edge for edge in edges if start <= edge <= end)
    reached, current = start, -1
    for first, last in itertools.pairwise(marks):
        visual = any(low <= first < high for low, high in slots.visual)
        codec = codecs.index(EXACT) if residual and first >= exact_from else 0 if visual else of_text
        if codec != current and first > reached:
            yield reached, first - reached, current
            reached = first
        current = codec
        if last == end:
            yield reached, end - reached, current
