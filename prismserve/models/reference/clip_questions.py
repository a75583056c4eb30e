"""The families of questions about a clip and their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from prismserve.models.reference.questions import Question, article, worded
from prismserve.models.reference.vocabulary import COLOR_NAMES, SHAPES

__all__ = ["CLIP_FAMILIES", "STATIC_FAMILIES", "Actor", "Question", "ask", "drill"]

CLIP_FAMILIES: Final = ("color", "shape", "exist", "direction", "order", "when", "frames", "count")
STATIC_FAMILIES: Final = ("color", "shape")
"""Any frame answers these."""
TEMPLATES: Final[dict[str, tuple[str, ...]]] = {
    "color": ("What color is the {s}?", "Which color does the {s} have?"),
    "shape": ("What shape is the {c} object?", "Which shape is {c}?"),
    "exist": ("Is there {r}?", "Do you see {r}?"),
    "direction": ("Which way does the {r} move?", "Where does the {r} move?"),
    "order_first": ("Which object is first?", "What do you see first?"),
    "order_last": ("Which object is last?", "What do you see last?"),
    "when": ("When do you see the {r}?", "When is the {r} shown?"),
    "frames": ("How many times do you see the {r}?", "How many times is the {r} shown?"),
    "count": ("How many objects are shown?", "How many shapes do you see?"),
}


@dataclass(frozen=True, slots=True)
class Actor:
    """A shape of a clip.

    Attributes:
        shape: one of ``SHAPES``.
        color: one of ``COLORS``; color and shape together are unique in a clip.
        seen: per frame, whether it is there.
        direction: ``left``, ``right``, ``up`` or ``down`` of one that moves; else empty.
    """

    shape: str
    color: str
    seen: tuple[bool, ...]
    direction: str

    @property
    def name(self) -> str:
        """Color and shape, as questions call it."""
        return f"{self.color} {self.shape}"

    @property
    def onset(self) -> int:
        """The first frame it is seen in."""
        return self.seen.index(True)

    @property
    def part(self) -> str:
        """``start``, ``middle`` or ``end`` where it is seen in no other part of the clip; else empty."""
        where = [frame for frame, there in enumerate(self.seen) if there]
        last = len(self.seen) - 1
        if where == [0]:
            return "start"
        if where == [last]:
            return "end"
        return "middle" if where[0] > 0 and where[-1] < last else ""


def ask(rng: np.random.Generator, actors: Sequence[Actor]) -> list[Question]:
    """Every question of a clip.

    Args:
        rng: draws wordings and choices; the order of the draws is part of what a seed means.
        actors: at least one, no two of one name.

    Returns:
        Triples, grouped by family.
    """
    mixed = [actors[i] for i in rng.permutation(len(actors))]
    out = [*_attributes(rng, mixed), *_existence(rng, mixed)]
    out += [_word(rng, "direction", one.direction, r=one.name) for one in mixed if one.direction][:2]
    out += [*_order(rng, mixed)]
    out += [_word(rng, "when", one.part, r=one.name) for one in mixed if one.part][:2]
    out += [*_frames(rng, mixed)]
    out.append(_word(rng, "count", str(len(actors))))
    return out


def drill(actors: Sequence[Actor]) -> list[Question]:
    """What is learnt last, for training: order, part and direction of every shape, each in all its wordings.

    A clip has less than one of each among its questions, and the words of the answers are new to the bundled decoder: it
    has to learn to spell ``middle`` and ``down`` letter by letter, where colors and numbers are one token.
    """
    asked = [("direction", "direction", one.name, one.direction) for one in actors if one.direction]
    asked += [("when", "when", one.name, one.part) for one in actors if one.part]
    asked += [("order", template, "", answer) for template, answer in _edges(actors)]
    return [
        (family, wording.format(r=name), answer)
        for family, template, name, answer in asked
        for wording in TEMPLATES[template]
    ]


def _word(rng: np.random.Generator, family: str, answer: str, template: str = "", **slots: str) -> Question:
    return worded(rng, TEMPLATES[template or family], family, answer, slots)


def _attributes(rng: np.random.Generator, actors: Sequence[Actor]) -> Iterator[Question]:
    """Color and shape of what is there in every frame and can be told by the other attribute."""
    shapes, colors = [one.shape for one in actors], [one.color for one in actors]
    always = [one for one in actors if all(one.seen)]
    yield from [_word(rng, "color", one.color, s=one.shape) for one in always if shapes.count(one.shape) == 1][:1]
    yield from [_word(rng, "shape", one.shape, c=one.color) for one in always if colors.count(one.color) == 1][:1]


def _existence(rng: np.random.Generator, actors: Sequence[Actor]) -> Iterator[Question]:
    """One yes, about the shape seen in the fewest frames, and one no that keeps a true attribute when it can."""
    names = {one.name for one in actors}
    yield _word(rng, "exist", "yes", r=article(min(actors, key=lambda one: sum(one.seen)).name))
    for _ in range(20):
        known = actors[int(rng.integers(len(actors)))]
        color, shape = str(rng.choice(COLOR_NAMES)), str(rng.choice(SHAPES))
        name = f"{known.color} {shape}" if rng.random() < 0.5 else f"{color} {known.shape}"
        if name not in names:
            yield _word(rng, "exist", "no", r=article(name))
            return


def _order(rng: np.random.Generator, actors: Sequence[Actor]) -> Iterator[Question]:
    for template, answer in _edges(actors):
        yield _word(rng, "order", answer, template)


def _edges(actors: Sequence[Actor]) -> Iterator[tuple[str, str]]:
    """Which is there before all others, and which comes after them, where there is one such: template and name."""
    onsets = [one.onset for one in actors]
    for template, edge in (("order_first", min(onsets)), ("order_last", max(onsets))):
        if len(actors) > 1 and onsets.count(edge) == 1:
            yield template, actors[onsets.index(edge)].name


def _frames(rng: np.random.Generator, actors: Sequence[Actor]) -> Iterator[Question]:
    """How often two of them are seen: one that is not there all the time first."""
    ranked = sorted(actors, key=lambda one: all(one.seen))
    yield from [_word(rng, "frames", str(sum(one.seen)), r=one.name) for one in ranked[:2]]
