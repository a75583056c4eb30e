"""What the systems are asked: seeded prompts and pictures, new ones in every round, so that no cache remembers them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from benchmarks.engine.systems.wire import Job

BATCHES: Final = (4, 8, 16)
SHARED: Final = 8
KEEP: Final = 64
_PICTURE_PX: Final = (640, 480)
_INTRO_TOKENS: Final = 12
_QUESTION_TOKENS: Final = (24, 40)
_TEXT_TOKENS: Final = (240, 272)


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of work.

    Attributes:
        name: of the row.
        batch: prompts at once.
        shared: whether all ask about one image.
        keep: visual tokens to keep; only our engine can.
    """

    name: str
    batch: int
    shared: bool = False
    keep: int | None = None


ONE: Final = Workload("one", 1)
PRUNED: Final = Workload("one-64", 1, keep=KEEP)
SHARED_IMAGE: Final = Workload("shared-8", SHARED, shared=True)


def workloads(*, sees: bool) -> tuple[Workload, ...]:
    """All kinds, in the order of a round."""
    batches = tuple(Workload(f"batch-{size}", size) for size in BATCHES)
    return (ONE, PRUNED, SHARED_IMAGE, *batches) if sees else (ONE, *batches)


class Prompts:
    """Draws jobs for one checkpoint.

    Args:
        folder: where pictures go.
        ids: range that text tokens are drawn from.
        image_token: None for a text-only model.
    """

    def __init__(self, folder: Path, ids: range, image_token: int | None) -> None:
        self._folder = folder
        self._ids = ids
        self._image_token = image_token

    def jobs(self, workload: Workload, seed: int, tokens: int) -> Sequence[Job]:
        """Jobs of a workload; the same for the same seed."""
        draw = random.Random(f"{workload.name} {seed}")
        intro = self._text(draw, _INTRO_TOKENS)
        picture = self._picture(workload, seed, 0)
        jobs = []
        for number in range(workload.batch):
            if not workload.shared and number:
                intro, picture = self._text(draw, _INTRO_TOKENS), self._picture(workload, seed, number)
            if self._image_token is None:
                jobs.append(Job(self._text(draw, draw.randint(*_TEXT_TOKENS)), None, tokens, None))
                continue
            question = self._text(draw, draw.randint(*_QUESTION_TOKENS))
            jobs.append(Job([*intro, self._image_token, *question], picture, tokens, workload.keep))
        return jobs

    def _text(self, draw: random.Random, tokens: int) -> list[int]:
        return [draw.choice(self._ids) for _ in range(tokens)]

    def _picture(self, workload: Workload, seed: int, number: int) -> str | None:
        """A file of coarse colored noise."""
        if self._image_token is None:
            return None
        path = self._folder / f"{workload.name}-{seed}-{number}.png"
        if not path.is_file():
            generator = np.random.default_rng([seed, number, *workload.name.encode()])
            blocks = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize(_PICTURE_PX, Image.Resampling.BICUBIC).save(path)
        return str(path)
