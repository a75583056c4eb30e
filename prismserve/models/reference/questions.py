"""The ten families of questions about a scene and their answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from prismserve.models.reference.vocabulary import COLOR_NAMES, PLURAL, SHAPES, SIZE, TEMPLATES

Question: TypeAlias = tuple[str, str, str]
"""(family, question, answer)."""

_QUADRANT_MARGIN_PX = 12
_RELATION_GAP_PX = 24
_CAPTION_GAP_PX = 20


@dataclass(frozen=True, slots=True)
class SceneObject:
    """A shape in a scene; ``x`` and ``y`` are its center in pixels."""

    shape: str
    color: str
    size: str
    x: float
    y: float

    @property
    def name(self) -> str:
        """Color and shape, as questions call it."""
        return f"{self.color} {self.shape}"


def ask(rng: np.random.Generator, objects: Sequence[SceneObject], text_kind: str, text: str) -> list[Question]:
    """Every question of a scene.

    Args:
        rng: draws wordings and choices; the order of the draws is part of what a seed means.
        objects: at least one shape.
        text_kind: ``number``, ``word`` or empty.
        text: what is written in the scene.

    Returns:
        Triples, grouped by family.
    """
    order = [int(i) for i in rng.permutation(len(objects))]
    names = [o.name for o in objects]
    single = [i for i in order if names.count(names[i]) == 1]
    out = [*_attributes(rng, objects, order, single), *_counts(rng, objects), *_existence(rng, objects)]
    out += [*_positions(rng, objects, single), *_relations(rng, objects, single)]
    if text_kind:
        out.append(_word(rng, text_kind, text))
    out += _caption(rng, objects)
    return out


def worded(
    rng: np.random.Generator, templates: tuple[str, ...], family: str, answer: str, slots: Mapping[str, str]
) -> Question:
    """One question in one of its wordings."""
    return family, templates[rng.integers(len(templates))].format(**slots), answer


def _word(rng: np.random.Generator, family: str, answer: str, template: str = "", **slots: str) -> Question:
    return worded(rng, TEMPLATES[template or family], family, answer, slots)


def article(text: str) -> str:
    """``text`` behind its article."""
    return ("an " if text[0] in "aeiou" else "a ") + text


def _attributes(
    rng: np.random.Generator, objects: Sequence[SceneObject], order: Sequence[int], single: Sequence[int]
) -> Iterator[Question]:
    shapes = [o.shape for o in objects]
    colors = [o.color for o in objects]
    for i in [i for i in order if shapes.count(shapes[i]) == 1][:2]:
        yield _word(rng, "color", colors[i], s=shapes[i])
    for i in [i for i in order if colors.count(colors[i]) == 1][:2]:
        yield _word(rng, "shape", shapes[i], c=colors[i])
    for i in single[:2]:
        yield _word(rng, "size", objects[i].size, r=objects[i].name)


def _counts(rng: np.random.Generator, objects: Sequence[SceneObject]) -> Iterator[Question]:
    """How many in all, of one shape, of one color."""
    shapes = [o.shape for o in objects]
    colors = [o.color for o in objects]
    yield _word(rng, "count", str(len(objects)), p=str(rng.choice(["shapes", "objects"])))
    pick = str(rng.choice(shapes)) if rng.random() < 0.8 else str(rng.choice(SHAPES))
    yield _word(rng, "count", str(shapes.count(pick)), p=PLURAL[pick])
    pick = str(rng.choice(colors)) if rng.random() < 0.8 else str(rng.choice(COLOR_NAMES))
    yield _word(rng, "count", str(colors.count(pick)), p=pick + " shapes")


def _existence(rng: np.random.Generator, objects: Sequence[SceneObject]) -> Iterator[Question]:
    """One yes and one no; the no keeps one true attribute when it can."""
    names = [o.name for o in objects]
    yield _word(rng, "exist", "yes", r=article(str(rng.choice(names))))
    for _ in range(20):
        mode = rng.random()
        color = str(rng.choice(COLOR_NAMES if mode < 0.4 else [o.color for o in objects]))
        shape = str(rng.choice(SHAPES if 0.4 <= mode < 0.8 else [o.shape for o in objects]))
        if f"{color} {shape}" not in names:
            yield _word(rng, "exist", "no", r=article(f"{color} {shape}"))
            return


def _positions(rng: np.random.Generator, objects: Sequence[SceneObject], single: Sequence[int]) -> Iterator[Question]:
    half = SIZE / 2
    clear = [i for i in single if min(abs(objects[i].x - half), abs(objects[i].y - half)) >= _QUADRANT_MARGIN_PX]
    for i in clear[:2]:
        where = ("top" if objects[i].y < half else "bottom") + (" left" if objects[i].x < half else " right")
        yield _word(rng, "position", where, r=objects[i].name)


def _relations(rng: np.random.Generator, objects: Sequence[SceneObject], single: Sequence[int]) -> Iterator[Question]:
    """One question left or right, one above or below, about the first pair far enough apart."""
    pairs = [(i, j) for i in single for j in single if i != j]
    rng.shuffle(pairs)
    for axis, template, words in (("x", "relation_h", ("left", "right")), ("y", "relation_v", ("above", "below"))):
        for i, j in pairs:
            gap = getattr(objects[i], axis) - getattr(objects[j], axis)
            if abs(gap) >= _RELATION_GAP_PX:
                yield _word(rng, "relation", words[int(gap > 0)], template, a=objects[i].name, b=objects[j].name)
                break


def _caption(rng: np.random.Generator, objects: Sequence[SceneObject]) -> Iterator[Question]:
    """The shapes from left to right, where their order is plain."""
    row = sorted(objects, key=lambda o: o.x)
    gaps = np.diff([o.x for o in row])
    if len(row) > 3 or (len(row) > 1 and gaps.min() < _CAPTION_GAP_PX):
        return
    parts = [article(o.name) for o in row]
    caption = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    yield _word(rng, "caption", caption)
