"""Short synthetic clips with questions about what happens in them: ``make_clip(seed) -> (frames, questions)``.

A clip is four frames of one muted background with the shapes of :mod:`scenes` on it, seen by a camera that stands still
and has a little noise of its own. Every shape has a track: it stands still in all frames, moves a step a frame in one
direction, enters and stays, or shows itself in some frames only. Everything is a pure function of the seed; held-out
clips start at ``HELD_OUT_SEED`` as held-out scenes do, and no clip shares a stream with the scene of its number.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prismserve.models.reference import drawing
from prismserve.models.reference.clip_questions import Actor, Question, ask
from prismserve.models.reference.scenes import HELD_OUT_SEED
from prismserve.models.reference.vocabulary import COLOR_NAMES, COLORS, SHAPES, SIZE, SIZE_NAMES, SIZES

__all__ = ["FRAMES", "HELD_OUT_SEED", "TOKENS", "Clip", "Track", "make_clip"]

FRAMES: Final = 4
SIDE: Final = 7
"""Rows and columns of tokens in a frame: means over 2 x 2 of the tower's 14 x 14 patches."""
FRAME_TOKENS: Final = SIDE**2
TOKENS: Final = FRAMES * FRAME_TOKENS
ACTORS_MAX: Final = 5

_STREAM, _BACKGROUND, _NOISE = 2, 3, 4
_GAP_PX: Final = 5
_MARGIN_PX: Final = 3
_STEP_PX: Final = (24, 40)
_NOISE_LEVELS: Final = 3
_SHOWN_PX: Final = 40
"""Pixels of a token's 32 x 32 from which on a shape counts as shown by it."""
_DIRECTIONS: Final = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


class Track(enum.StrEnum):
    """What a shape does."""

    STILL = "still"
    MOVES = "moves"
    ENTERS = "enters"
    FLASHES = "flashes"


_TRACKS: Final = tuple(Track)
_TRACK_SHARES: Final = (0.25, 0.3, 0.2, 0.25)


@dataclass(frozen=True, slots=True)
class _Box:
    """A region that is taken, in pixels."""

    left: int
    top: int
    right: int
    bottom: int

    def apart(self, other: _Box) -> bool:
        """Whether there is a gap between the two."""
        return (
            self.right + _GAP_PX <= other.left
            or other.right + _GAP_PX <= self.left
            or self.bottom + _GAP_PX <= other.top
            or other.bottom + _GAP_PX <= self.top
        )


class Clip:
    """One clip with the ground truth for questions, dense labels and the oracle.

    Args:
        seed: at least 0; the clip is a pure function of it.

    Attributes:
        frames: [4, 224, 224, 3] uint8, RGB.
        actors: the shapes, each with its track.
        owner: [4, 224, 224] uint8, 1 + the index of the actor that covers a pixel, 0 for none.
        rng: the stream everything but background and noise is drawn from: clip, questions, packing in training.
    """

    def __init__(self, seed: int) -> None:
        rng = self.rng = np.random.default_rng([seed, _STREAM])
        backdrop = drawing.background(np.random.default_rng([seed, _BACKGROUND]))
        self._pixels = np.repeat(backdrop[None], FRAMES, axis=0)
        self._taken: list[_Box] = []
        self.actors: list[Actor] = []
        self.owner = np.zeros((FRAMES, SIZE, SIZE), np.uint8)
        names = [(shape, color) for shape in SHAPES for color in COLOR_NAMES]
        wanted = int(rng.choice([2, 3, 4, 5], p=[0.25, 0.3, 0.25, 0.2]))
        for pick in rng.choice(len(names), wanted, replace=False):
            self._add(*names[pick])
        self.frames = self._seen(np.random.default_rng([seed, _NOISE]))

    def _seen(self, noise: np.random.Generator) -> NDArray[np.uint8]:
        """What the camera gives: brightness of each frame and of each sample a little off."""
        flicker = noise.integers(-_NOISE_LEVELS, _NOISE_LEVELS + 1, (FRAMES, 1, 1, 1))
        grain = noise.integers(-_NOISE_LEVELS, _NOISE_LEVELS + 1, self._pixels.shape, dtype=np.int8)
        seen: NDArray[np.uint8] = np.clip(self._pixels + flicker + grain, 0, 255).astype(np.uint8)
        return seen

    def _add(self, shape: str, color: str) -> None:
        rng = self.rng
        low, high = SIZES[str(rng.choice(SIZE_NAMES))]
        size = int(rng.integers(low, high + 1))
        track = Track(rng.choice(_TRACKS, p=_TRACK_SHARES))
        seen = self._visible(track)
        direction = str(rng.choice(tuple(_DIRECTIONS))) if track == Track.MOVES else ""
        step = int(rng.integers(_STEP_PX[0], _STEP_PX[1] + 1)) if direction else 0
        across, down = _DIRECTIONS.get(direction, (0, 0))
        reach = step * (FRAMES - 1)
        corner = self._place(size + abs(across) * reach, size + abs(down) * reach)
        if corner is None:
            return
        mask = drawing.shape_mask(shape, size, rng)
        ink = np.clip(np.array(COLORS[color]) + rng.uniform(-12, 12, 3), 0, 255).astype(np.float32)
        start = corner[0] + (reach if across < 0 else 0), corner[1] + (reach if down < 0 else 0)
        self.actors.append(Actor(shape, color, seen, direction))
        for frame in np.flatnonzero(seen):
            x, y = start[0] + across * step * int(frame), start[1] + down * step * int(frame)
            window = self._pixels[frame, y : y + size, x : x + size]
            window += mask[..., None] * (ink - window)
            self.owner[frame, y : y + size, x : x + size][mask > 0.5] = len(self.actors)

    def _visible(self, track: Track) -> tuple[bool, ...]:
        """In which frames a shape is seen."""
        rng = self.rng
        if track == Track.ENTERS:
            onset = int(rng.integers(1, FRAMES))
            return tuple(frame >= onset for frame in range(FRAMES))
        if track == Track.FLASHES:
            count = int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
            chosen = rng.choice(FRAMES, count, replace=False)
            return tuple(frame in chosen for frame in range(FRAMES))
        return (True,) * FRAMES

    def _place(self, width: int, height: int) -> tuple[int, int] | None:
        """A free corner for everything a shape sweeps over, remembered as taken; None after 40 attempts."""
        for _ in range(40):
            x = int(self.rng.integers(_MARGIN_PX, SIZE - width - _MARGIN_PX + 1))
            y = int(self.rng.integers(_MARGIN_PX, SIZE - height - _MARGIN_PX + 1))
            box = _Box(x, y, x + width, y + height)
            if all(box.apart(taken) for taken in self._taken):
                self._taken.append(box)
                return x, y
        return None

    def covered(self) -> NDArray[np.int64]:
        """[4, 7, 7] int64, 1 + the index of the actor with the most pixels of a token, 0 where it shows none."""
        cell = SIZE // SIDE
        tiles = self.owner.reshape(FRAMES, SIDE, cell, SIDE, cell)
        areas = np.stack([(tiles == index + 1).sum((2, 4)) for index in range(len(self.actors))])
        return np.where(areas.max(0) >= _SHOWN_PX, areas.argmax(0) + 1, 0).astype(np.int64)

    def foreground(self) -> NDArray[np.bool_]:
        """[196] bool, frame by frame: tokens that show a shape."""
        return (self.covered() > 0).reshape(-1)

    def questions(self) -> list[Question]:
        """About ten questions; drawn from ``rng``, so only the first call belongs to the seed."""
        return ask(self.rng, self.actors)


def make_clip(seed: int) -> tuple[NDArray[np.uint8], list[Question]]:
    """Draw a clip and its questions.

    Args:
        seed: at least 0; held-out clips start at ``HELD_OUT_SEED``.

    Returns:
        Frames [4, 224, 224, 3] uint8 and (family, question, answer) triples.
    """
    clip = Clip(seed)
    return clip.frames, clip.questions()
