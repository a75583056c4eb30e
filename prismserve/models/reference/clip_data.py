"""What training on clips reads: tokens of clips seen once and asked about again, labels over time, conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from prismserve.models.reference.clip_questions import Actor, ask, drill
from prismserve.models.reference.clips import FRAMES, TOKENS, Clip
from prismserve.models.reference.data import Packed, Scenes, Span, columns
from prismserve.models.reference.heads import Hits, TokenClassifiers
from prismserve.models.reference.vocabulary import COLOR_NAMES, SHAPES

PREFIX_TOKENS: Final = 1 + TOKENS + 1
"""Positions before the first question: the user token, the clip, and the token behind it."""
_DIRECTIONS: Final = ("left", "right", "up", "down")


def labels(clip: Clip) -> dict[str, NDArray[np.int64]]:
    """Classes of every token, each [196] int64, frame by frame; 0 means background but for ``frame``.

    ``frame``: which frame it is of. ``shape``, ``color``: of the actor it shows. ``seen``: 1 + the number of earlier
    frames that actor is in. ``motion``: 1 where it has not moved up to this frame, else 2 and on by direction.
    """
    covered = clip.covered()
    out = {name: np.zeros_like(covered) for name in ("shape", "color", "seen", "motion")}
    out["frame"] = np.broadcast_to(np.arange(FRAMES)[:, None, None], covered.shape).astype(np.int64)
    for index, actor in enumerate(clip.actors):
        here = covered == index + 1
        out["shape"][here] = SHAPES.index(actor.shape) + 1
        out["color"][here] = COLOR_NAMES.index(actor.color) + 1
        for frame in range(FRAMES):
            moved = _DIRECTIONS.index(actor.direction) + 2 if actor.direction and frame else 1
            out["seen"][frame][here[frame]] = 1 + sum(actor.seen[:frame])
            out["motion"][frame][here[frame]] = moved
    return {name: value.reshape(-1) for name, value in out.items()}


@dataclass(frozen=True, slots=True)
class Watched:
    """One clip behind tower and projector.

    Attributes:
        tokens: [197, D] bfloat16 decoder inputs, the token behind the last frame included.
        labels: see :func:`labels`, as tensors.
        actors: what questions are asked about.
    """

    tokens: torch.Tensor
    labels: Mapping[str, torch.Tensor]
    actors: Sequence[Actor]


@dataclass(frozen=True, slots=True)
class ClipBatch:
    """Some clips, each with K of its tokens and a row of conversations; fields as of ``data.Batch``.

    Attributes:
        tokens: [B, K + 1, D] decoder inputs.
        places: [B, K] int64 ascending, which of the 196 tokens they are.
        labels: each [B, K].
        ids, positions, segments, targets: [B, T] int64.
        spans: per clip, where each answer is.
    """

    tokens: torch.Tensor
    places: torch.Tensor
    labels: Mapping[str, torch.Tensor]
    ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    targets: torch.Tensor
    spans: tuple[tuple[Span, ...], ...]


class Asker(Scenes):
    """Puts conversations about clips into rows."""

    text_tokens: ClassVar[int] = 104
    first: ClassVar[frozenset[str]] = frozenset({"order", "when", "direction"})

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, 0, 1)

    def ask_about(
        self, clips: Sequence[Watched], visible: int, rng: np.random.Generator, *, single: bool, drilled: float = 0.0
    ) -> ClipBatch:
        """Ask about clips of which so many tokens are seen.

        Args:
            clips: at least one.
            visible: K; tokens that show a shape come first, background drawn at random fills up.
            rng: draws questions, wordings, order and background.
            single: no follow-up turns.
            drilled: share of the clips that are also asked :func:`~clip_questions.drill`.
        """
        rows: list[Packed] = []
        for clip in clips:
            more = drill(clip.actors) if drilled and rng.random() < drilled else []
            rows.append(self.pack([*more, *ask(rng, clip.actors)], rng, single=single))
        noise = torch.from_numpy(rng.random((len(clips), TOKENS)))
        shown = torch.stack([clip.labels["shape"] > 0 for clip in clips])
        places = (noise + 2 * shown).argsort(1, descending=True)[:, :visible].sort(1).values
        slots = torch.cat([places, torch.full((len(clips), 1), TOKENS)], 1)
        names = clips[0].labels
        return ClipBatch(
            tokens=torch.stack([clip.tokens[at] for clip, at in zip(clips, slots, strict=True)]),
            places=places,
            labels={name: torch.stack([clip.labels[name] for clip in clips]).gather(1, places) for name in names},
            **columns(rows),
        )


class ClipHeads(TokenClassifiers):
    """Linear classifiers of the clip's tokens inside the decoder, for training only; background counts 0.15."""

    CLASSES: ClassVar[dict[str, int]] = {
        "frame": FRAMES,
        "shape": len(SHAPES) + 1,
        "color": len(COLOR_NAMES) + 1,
        "seen": FRAMES + 1,
        "motion": len(_DIRECTIONS) + 2,
    }

    def forward(self, tokens: torch.Tensor, truth: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Hits]:
        """[B, K, D] decoder states to the summed cross-entropy and the share right off the background."""
        shown = truth["shape"] > 0
        weight = torch.where(shown, 1.0, 0.15).reshape(-1)
        losses, hits = [], {}
        for name, guess in self.guesses(tokens).items():
            each = F.cross_entropy(guess.flatten(0, -2), truth[name].reshape(-1), reduction="none")
            losses.append((each * weight).sum() / weight.sum())
            hits[name] = float((guess.argmax(-1) == truth[name])[shown].float().mean()) if shown.any() else 1.0
        return torch.stack(losses).sum(), hits
