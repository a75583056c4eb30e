"""What is asked: seeded pictures and questions, new ones in every round, under one compression or another."""

from __future__ import annotations

import dataclasses
import io
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from PIL import Image

from benchmarks.workers import Turn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.router.calls import Call

SHARES: Final = (0.5, 0.25, 0.125)
SIZES_PX: Final = ((640, 480), (336, 336), (480, 640), (1024, 768), (224, 300), (800, 450))
_VOCABULARY: Final = (
    "what which where many picture colors shapes left right above below largest describe answer short sentence explain"
)
_WORDS: Final = tuple(_VOCABULARY.split())
_QUESTION_WORDS: Final = (6, 12)
_COARSE: Final = (9, 12, 3)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compress.

    Attributes:
        stage: ``visual`` or ``prefill``; empty for no compression.
        method: its name.
        share: visual tokens kept, of all; of a prefill method, those left behind its last cut.
    """

    stage: str
    method: str
    share: float

    @property
    def name(self) -> str:
        """As rows and series are called."""
        return f"{self.label} {100 * self.share:g} %" if self.stage else self.label

    @property
    def label(self) -> str:
        """The method, with its stage where that is not the usual one."""
        return f"prefill/{self.method}" if self.stage == "prefill" else self.method

    @property
    def field(self) -> dict[str, Any]:
        """The request's field ``compression``."""
        if not self.stage:
            return {"preset": "off"}
        return {"preset": "off", self.stage: {"method": self.method, "keep": self.share}}


OFF: Final = Variant("", "off", 1.0)


def variants(methods: Sequence[str]) -> tuple[Variant, ...]:
    """No compression, then every method (``name`` or ``prefill/name``) at every share."""
    found = [OFF]
    for name in methods:
        stage, _, method = name.rpartition("/")
        found += [Variant(stage or "visual", method, share) for share in SHARES]
    return tuple(found)


@dataclass(frozen=True)
class Asked(Turn):
    """A turn under a compression of its own, answered at full length whatever the model thinks of stopping."""

    compression: dict[str, Any] | None = None

    def call(self) -> Call:
        """What a front door would make of it."""
        plain = super().call()
        options = {**plain.options, "ignore_eos": True}
        return dataclasses.replace(plain, options=options, compression=self.compression)


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer.

    Attributes:
        first_s: from the beginning of the run to its first token.
        tokens: generated.
        visual_before: visual tokens of its picture.
        visual_after: those left, in the last layer where layers differ.
        kv_bytes: of the prompt's KV as it was kept.
        kv_sent_bytes: of it, what crossed between workers; 0 in one process.
        encode_ms: of the vision encoder and the visual method.
    """

    first_s: float
    tokens: int
    visual_before: int
    visual_after: int
    kv_bytes: int
    kv_sent_bytes: int
    encode_ms: float


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of one run: its answers, the whole time, and the most KV blocks in use at once (0: not known)."""

    answers: tuple[Answered, ...]
    wall_s: float
    peak_blocks: int

    @property
    def requests_per_s(self) -> float:
        """Answers over the whole time."""
        return len(self.answers) / self.wall_s

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the whole time, prompts included."""
        return sum(answer.tokens for answer in self.answers) / self.wall_s


class System(Protocol):
    """What answers: an engine in this process, or a cluster."""

    about: str

    async def run(self, turns: Sequence[Asked]) -> Ran:
        """Answer turns, all at once and with nothing cached; RuntimeError if one fails."""
        ...


def draw(seed: int, count: int, tokens: int, variant: Variant, salt: str = "") -> tuple[Asked, ...]:
    """``count`` turns, each with a picture, a size and a question of its own; the same for the same seed."""
    turns = []
    for number in range(count):
        words = random.Random(f"{seed} {number}")
        question = " ".join(words.choice(_WORDS) for _ in range(words.randint(*_QUESTION_WORDS)))
        size_px = SIZES_PX[(seed + number) % len(SIZES_PX)]
        picture = _picture(seed, number, size_px)
        turns.append(Asked((f"{question}?",), (picture,), tokens, salt, variant.field))
    return tuple(turns)


def _picture(seed: int, number: int, size_px: tuple[int, int]) -> bytes:
    """A PNG file of coarse colored noise."""
    blocks = np.random.default_rng([seed, number]).integers(0, 256, _COARSE, dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(blocks).resize(size_px, Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()
