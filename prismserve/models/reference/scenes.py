"""Synthetic scenes with questions: ``make_scene(seed) -> (image, [(family, question, answer), ...])``.

Everything is a pure function of the seed. Photographs that ship inside scikit-image and scikit-learn serve as
backgrounds when those packages are installed, plain color otherwise; shapes, text, questions and answers are the same
either way, because backgrounds are drawn from a stream of their own.

A scene is a muted background (plain, gradient, stripes, blotches, noise or a crop of a photograph), one to five
shapes that do not overlap (6 shapes x 8 colors x 3 sizes) and, in four fifths of the scenes, a number of 1 to 4 digits
or one of 60 words. Most of the image is background, so most visual tokens carry no answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from prismserve.models.reference import drawing, questions
from prismserve.models.reference.vocabulary import (
    CHARS,
    COLOR_NAMES,
    COLORS,
    FAMILIES,
    GRID,
    PATCH,
    SHAPES,
    SIZE,
    SIZE_NAMES,
    SIZES,
    WORDS,
)

__all__ = ["FAMILIES", "HELD_OUT_SEED", "GlyphBox", "Scene", "make_scene"]

HELD_OUT_SEED = 10_000_000
"""Evaluation seeds start here; training seeds stay below 9.9 million."""

_GAP_PX = 5
_MARGIN_PX = 3


@dataclass(frozen=True, slots=True)
class GlyphBox:
    """Where one glyph was drawn, in pixels."""

    glyph: str
    left: float
    top: float
    right: float
    bottom: float


class Scene:
    """One picture with the ground truth for questions and dense labels.

    Args:
        seed: at least 0; the scene is a pure function of it.

    Attributes:
        image: 224 x 224 RGB.
        objects: the shapes in the order they were drawn.
        text: the number or word in the picture, empty if there is none; ``text_kind`` says which.
        char_boxes: where its glyphs are.
        owner: [224, 224] uint8, 1 + the index of the object that covers a pixel, 0 for none.
        rng: the stream everything but the background is drawn from, in this order: scene, questions, and packing in
            training.
    """

    def __init__(self, seed: int) -> None:
        rng = self.rng = np.random.default_rng(seed)
        self._pixels = drawing.background(np.random.default_rng([seed, 1]))
        self._boxes: list[tuple[int, int, int, int]] = []
        self.objects: list[questions.SceneObject] = []
        self.text, self.text_kind = "", ""
        self.char_boxes: list[GlyphBox] = []
        kind = str(rng.choice(["number", "word", ""], p=[0.4, 0.4, 0.2]))
        if kind:
            self._add_text(kind)
        count = rng.choice([1, 2, 3, 4, 5], p=[0.2, 0.25, 0.2, 0.18, 0.17])
        shapes, colors = list(SHAPES), list(COLOR_NAMES)
        if rng.random() < 0.4:  # repeated attributes make counting and reference harder
            shapes = list(rng.choice(shapes, 2, replace=False))
        if rng.random() < 0.4:
            colors = list(rng.choice(colors, 2, replace=False))
        self.owner = np.zeros((SIZE, SIZE), np.uint8)
        for _ in range(count):
            self._add_object(str(rng.choice(shapes)), str(rng.choice(colors)), str(rng.choice(SIZE_NAMES)))
        self.image = Image.fromarray(np.clip(self._pixels, 0, 255).astype(np.uint8))

    def _place(self, width: int, height: int) -> tuple[int, int] | None:
        """A free corner for a box, remembered as taken; None after 40 attempts."""
        for _ in range(40):
            x = int(self.rng.integers(_MARGIN_PX, SIZE - width - _MARGIN_PX))
            y = int(self.rng.integers(_MARGIN_PX, SIZE - height - _MARGIN_PX))
            right, bottom = x + width + _GAP_PX, y + height + _GAP_PX
            if all(right <= a or c + _GAP_PX <= x or bottom <= b or d + _GAP_PX <= y for a, b, c, d in self._boxes):
                self._boxes.append((x, y, x + width, y + height))
                return x, y
        return None

    def _add_text(self, kind: str) -> None:
        rng = self.rng
        if kind == "number":
            digits = int(rng.integers(1, 5))
            text = str(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
        else:
            text = str(rng.choice(WORDS))
        glyphs = text.upper()
        cell, font_size = int(rng.integers(17, 22)), int(rng.integers(24, 29))
        width, height = cell * len(glyphs) + 6, font_size + 2
        where = self._place(width, height)
        if where is None:  # cannot happen while text is the first thing placed; then the scene has no text
            return
        x, y = where
        bright = rng.random() < 0.5
        ink, paper = ((250, 250, 250), (20, 20, 20)) if bright else ((15, 15, 15), (245, 245, 245))
        image = Image.fromarray(self._pixels.astype(np.uint8))
        draw = ImageDraw.Draw(image)
        plate = rng.random() < 0.6
        if plate:
            draw.rectangle((x, y, x + width - 1, y + height - 1), fill=paper)
        for i, glyph in enumerate(glyphs):
            draw.text(
                (x + 3 + cell * (i + 0.5), y + height / 2),
                glyph,
                fill=ink,
                font=drawing.font(font_size),
                anchor="mm",
                stroke_width=0 if plate else 2,
                stroke_fill=paper,
            )
            left = x + 3 + cell * i
            self.char_boxes.append(GlyphBox(glyph, left, y + 4, left + cell, y + height - 4))
        self._pixels = np.asarray(image, dtype=np.float32).copy()
        self.text, self.text_kind = text, kind

    def _add_object(self, shape: str, color: str, size_name: str) -> None:
        rng = self.rng
        low, high = SIZES[size_name]
        size = int(rng.integers(low, high + 1))
        where = self._place(size, size)
        if where is None:
            return
        x, y = where
        mask = drawing.shape_mask(shape, size, rng)
        ink = np.clip(np.array(COLORS[color]) + rng.uniform(-12, 12, 3), 0, 255)
        window = self._pixels[y : y + size, x : x + size]
        window += mask[..., None] * (ink.astype(np.float32) - window)
        self.objects.append(questions.SceneObject(shape, color, size_name, x + size / 2, y + size / 2))
        self.owner[y : y + size, x : x + size][mask > 0.5] = len(self.objects)

    def labels(self) -> dict[str, NDArray[np.int64]]:
        """Per-patch classes for the vision warm-up, each [196] int64; 0 means background.

        ``shape``, ``color``, ``size``: of the shape that covers the patch. ``center``: the patch holds a shape's
        center. ``char``, ``index``: the glyph over the patch and its place in the text. ``row``, ``col``: where the
        patch is, counted from 1.
        """
        out = {k: np.zeros((GRID, GRID), np.int64) for k in ("shape", "color", "size", "center", "char", "index")}
        out["row"], out["col"] = np.indices((GRID, GRID)) + 1
        tiles = self.owner.reshape(GRID, PATCH, GRID, PATCH)
        covered = np.full((GRID, GRID), 24)  # a shape counts from about a tenth of the patch
        for i, drawn in enumerate(self.objects):
            area = (tiles == i + 1).sum((1, 3))
            win = area > covered
            covered = np.maximum(covered, area)
            out["shape"][win] = SHAPES.index(drawn.shape) + 1
            out["color"][win] = COLOR_NAMES.index(drawn.color) + 1
            out["size"][win] = SIZE_NAMES.index(drawn.size) + 1
            out["center"][int(drawn.y) // PATCH, int(drawn.x) // PATCH] = 1
        edges = np.arange(GRID) * PATCH
        inked = np.full((GRID, GRID), 36.0)
        for i, box in enumerate(self.char_boxes):
            across = np.clip(np.minimum(box.right, edges + PATCH) - np.maximum(box.left, edges), 0, None)
            down = np.clip(np.minimum(box.bottom, edges + PATCH) - np.maximum(box.top, edges), 0, None)
            area = down[:, None] * across[None, :]
            win = area > inked
            inked = np.maximum(inked, area)
            out["char"][win] = CHARS.index(box.glyph) + 1
            out["index"][win] = i + 1
        return {k: v.reshape(-1) for k, v in out.items()}

    def questions(self) -> list[questions.Question]:
        """About 13 questions; drawn from ``rng``, so only the first call belongs to the seed."""
        return questions.ask(self.rng, self.objects, self.text_kind, self.text)


def make_scene(seed: int) -> tuple[Image.Image, list[questions.Question]]:
    """Draw a scene and its questions.

    Args:
        seed: at least 0; held-out scenes start at ``HELD_OUT_SEED``.

    Returns:
        The 224 x 224 RGB image and its (family, question, answer) triples.
    """
    scene = Scene(seed)
    return scene.image, scene.questions()
