"""What scenes are made of: sizes, shapes, colors, words, and the wordings of the questions."""

from __future__ import annotations

from typing import Final

SIZE: Final = 224
"""Width and height of a scene in pixels."""
PATCH: Final = 16
GRID: Final = SIZE // PATCH
IMAGE_TOKENS: Final = GRID**2

SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "ring")
PLURAL: Final = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
COLORS: Final = {
    "red": (222, 36, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 228, 40),
    "green": (36, 160, 60),
    "cyan": (40, 215, 225),
    "blue": (36, 70, 225),
    "purple": (150, 40, 190),
    "white": (250, 250, 250),
}
COLOR_NAMES: Final = tuple(COLORS)
SIZES: Final = {"small": (20, 24), "medium": (32, 38), "large": (50, 58)}
"""Least and largest width of a shape in pixels."""
SIZE_NAMES: Final = tuple(SIZES)
WORDS: Final = tuple(
    """cat dog sun car bus cup hat box key pen map fox owl bee ant egg ice jam zoo sky
bird fish frog bear lion duck moon tree leaf rain snow lamp door book ball kite ship boat milk cake
apple bread chair table clock horse tiger zebra house river stone cloud train plane piano lemon grape
robot queen mango""".split()  # noqa: SIM905 - sixty words read better as text
)
CHARS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FAMILIES: Final = (
    "color",
    "shape",
    "size",
    "count",
    "exist",
    "position",
    "relation",
    "number",
    "word",
    "caption",
)

TEMPLATES: Final[dict[str, tuple[str, ...]]] = {
    "color": (
        "What color is the {s}?",
        "Which color does the {s} have?",
        "Tell me the color of the {s}.",
        "The {s} is what color?",
    ),
    "shape": (
        "What shape is the {c} object?",
        "Which shape is {c}?",
        "Name the shape of the {c} object.",
        "What is the {c} object?",
    ),
    "size": ("What size is the {r}?", "How big is the {r}?", "Is the {r} small, medium or large?"),
    "count": (
        "How many {p} are there?",
        "Count the {p}.",
        "What is the number of {p} in the image?",
        "How many {p} do you see?",
    ),
    "exist": ("Is there {r}?", "Do you see {r}?", "Does the image contain {r}?", "Can you find {r} here?"),
    "position": (
        "Where is the {r}?",
        "In which corner of the image is the {r}?",
        "Which quadrant is the {r} in?",
        "Locate the {r}.",
    ),
    "relation_h": (
        "Is the {a} to the left or to the right of the {b}?",
        "Is the {a} left or right of the {b}?",
        "Relative to the {b}, is the {a} left or right?",
    ),
    "relation_v": (
        "Is the {a} above or below the {b}?",
        "Relative to the {b}, is the {a} above or below?",
        "Does the {a} lie above or below the {b}?",
    ),
    "number": (
        "What number is shown?",
        "Read the number.",
        "Which number is written in the image?",
        "What is the number?",
    ),
    "word": ("What word is shown?", "Read the word.", "Which word is written in the image?", "What is the word?"),
    "caption": (
        "Describe the image.",
        "Caption this image.",
        "List the shapes from left to right.",
        "What is in the image?",
    ),
}
