"""Where images and videos stand in a rendered chat: what a template wrote for them becomes slots among token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from prismserve.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of an image in a message or among token ids; ``index`` counts the media of the request."""

    index: int


@dataclass(frozen=True, slots=True)
class VideoSlot:
    """The place of a video in a message or among token ids; ``index`` counts the media of the request."""

    index: int


MediaSlot: TypeAlias = ImageSlot | VideoSlot


@dataclass(frozen=True, slots=True)
class Framed:
    """An image or video that a template placed.

    Attributes:
        slot: which one.
        token_id: what stands for it among ids, until the slot takes its place.
        text: that token's spelling, between the text the family puts around it.
    """

    slot: MediaSlot
    token_id: int
    text: str


def place(rendered: str, media: Mapping[str, Sequence[Framed]]) -> tuple[str, list[Framed]]:
    """Put media where a template wrote their placeholders.

    Args:
        rendered: the conversation, in which nothing a user typed looks like a placeholder.
        media: what each kind of placeholder stands for, in order.

    Returns:
        The text to tokenize, and what stands in it, in order of appearance.

    Raises:
        InvalidRequestError: the template placed more or fewer.
    """
    # Longest first, so that a placeholder that begins with another is matched whole.
    pattern = re.compile("|".join(map(re.escape, sorted(media, key=len, reverse=True))) or r"(?!)")
    found = pattern.findall(rendered)
    for written, wanted in media.items():
        if found.count(written) != len(wanted):
            _refuse(found.count(written), wanted)
    queues = {written: iter(wanted) for written, wanted in media.items()}
    order = [next(queues[written]) for written in found]
    texts = iter([item.text for item in order])
    return pattern.sub(lambda _: next(texts), rendered), order


def slotted(ids: Iterable[int], placed: Sequence[Framed]) -> list[int | MediaSlot]:
    """Token ids with a slot for each of ``placed``; InvalidRequestError if their tokens are not all there, and alone."""
    ids = list(ids)
    for token_id in {item.token_id for item in placed}:
        wanted = [item for item in placed if item.token_id == token_id]
        if ids.count(token_id) != len(wanted):
            _refuse(ids.count(token_id), wanted)
    queues = {item.token_id: iter([other for other in placed if other.token_id == item.token_id]) for item in placed}
    return [next(queues[token_id]).slot if token_id in queues else token_id for token_id in ids]


def _refuse(placed: int, wanted: Sequence[Framed]) -> NoReturn:
    kinds = {"images" if isinstance(item.slot, ImageSlot) else "videos" for item in wanted}
    message = (
        f"the model's chat template places {placed} of {len(wanted)} {' and '.join(sorted(kinds))}; "
        "put them in user messages"
    )
    raise InvalidRequestError(message, field="messages")
