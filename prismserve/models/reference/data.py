"""Batches of scenes: pixels, labels, and as many conversations as fit one sequence.

About eleven conversations share one image and one forward pass: a block-diagonal causal mask lets every conversation
see the image and itself only, and its positions start right behind the image, so the model is trained on exactly what
it meets at inference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

import numpy as np
import torch

from prismserve.models.reference.build import ASSISTANT, END, PAD, USER
from prismserve.models.reference.forward import COMPUTE, HIDDEN, PREFIX_TOKENS
from prismserve.models.reference.heads import Labels, describe, foreground
from prismserve.models.reference.questions import Question
from prismserve.models.reference.scenes import Scene

TEXT_TOKENS: Final = 150
"""Text positions of a training sequence."""
IGNORE: Final = -100
_FOLLOW_UP_SHARE: Final = 0.25
_FOLLOW_UP_OFFSET_MAX: Final = 60

Span = tuple[str, int, int]
"""(family, first slot, slots) of one answer in the target."""


@dataclass(slots=True)
class Packed:
    """Conversations of one scene in one row, each list as long as the row.

    Attributes:
        ids: token ids; padding is ``PAD``.
        positions: of each token, counted from the end of the image.
        segments: number of the conversation, from 1; -1 for padding.
        targets: the next token where it belongs to an answer, else -100.
        spans: where each answer is in ``targets``.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def pad(self, length: int) -> None:
        """Fill every list up to ``length``."""
        missing = length - len(self.ids)
        self.ids += [PAD] * missing
        self.positions += [0] * missing
        self.segments += [-1] * missing
        self.targets += [IGNORE] * missing


def columns(rows: Sequence[Packed]) -> dict[str, Any]:
    """The fields of a batch that rows of conversations fill: ``ids``, ``positions``, ``segments``, ``targets``, ``spans``."""
    return {
        "ids": torch.tensor([row.ids for row in rows]),
        "positions": torch.tensor([row.positions for row in rows]),
        "segments": torch.tensor([row.segments for row in rows]),
        "targets": torch.tensor([row.targets for row in rows]),
        "spans": tuple(tuple(row.spans) for row in rows),
    }


@dataclass(frozen=True, slots=True)
class Batch:
    """Some scenes.

    Attributes:
        pixels: [B, 224, 224, 3] uint8.
        labels: see ``heads.Labels``.
        ids, positions, segments, targets: [B, TEXT_TOKENS] int64, empty in batches without text.
        spans: per scene, where each answer is.
    """

    pixels: torch.Tensor
    labels: Labels
    ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    targets: torch.Tensor
    spans: tuple[tuple[Span, ...], ...]


class Conversations(Protocol):
    """What a batch of any kind has besides its pictures."""

    @property
    def positions(self) -> torch.Tensor:
        """[B, T] int64."""

    @property
    def segments(self) -> torch.Tensor:
        """[B, T] int64."""

    @property
    def targets(self) -> torch.Tensor:
        """[B, T] int64."""

    @property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """Where each answer is."""


class Scenes(torch.utils.data.IterableDataset[Batch]):
    """Consecutive seeds as batches.

    Args:
        tokenizer: encodes questions; None for batches of pixels and labels only.
        first_seed: of the first scene.
        batch: scenes in a batch.
        stop: first seed left out; None goes on for ever. A bounded set is for evaluation and has no follow-up turns.
    """

    text_tokens: ClassVar[int] = TEXT_TOKENS
    first: ClassVar[frozenset[str]] = frozenset({"number", "word", "caption"})
    """Families that are rare, or hard to learn: they have a place in a row before the others."""

    def __init__(self, tokenizer: Any | None, first_seed: int, batch: int, stop: int | None = None) -> None:
        self.tokenizer, self.first_seed, self.batch, self.stop = tokenizer, first_seed, batch, stop
        self._encoded: dict[str, list[int]] = {}

    def _encode(self, string: str) -> list[int]:
        if self.tokenizer is not None and string not in self._encoded:
            self._encoded[string] = self.tokenizer.encode(string, add_special_tokens=False)
        return self._encoded[string]

    def pack(self, questions: Sequence[Question], rng: np.random.Generator, *, single: bool) -> Packed:
        """Put conversations into one row while there is room, those of the families ``first`` before all others.

        Args:
            questions: of one scene.
            rng: draws the order and which turns follow up on the one before.
            single: no follow-up turns.
        """
        shuffled = [questions[i] for i in rng.permutation(len(questions))]
        turns = []
        room = self.text_tokens
        for family, question, answer in sorted(shuffled, key=lambda q: q[0] not in self.first):
            turn = (family, [*self._encode(question), ASSISTANT], [*self._encode(answer), END])
            need = len(turn[1]) + len(turn[2]) + 1
            if need <= room:
                room -= need
                turns.append(turn)
        row = Packed()
        conversation, offset = 0, 0
        for family, asked, answer_ids in (turns[i] for i in rng.permutation(len(turns))):
            question_ids = asked
            if conversation > 0 and not single and rng.random() < _FOLLOW_UP_SHARE and offset < _FOLLOW_UP_OFFSET_MAX:
                question_ids = [USER, *asked]
            else:
                conversation, offset = conversation + 1, 0
            length = len(question_ids) + len(answer_ids)
            row.spans.append((family, len(row.ids) + len(question_ids) - 1, len(answer_ids)))
            row.targets += [IGNORE] * (len(question_ids) - 1) + answer_ids + [IGNORE]
            row.positions += range(offset, offset + length)
            row.segments += [conversation] * length
            row.ids += question_ids + answer_ids
            offset += length
        row.pad(self.text_tokens)
        return row

    def _make(self, seeds: range) -> Batch:
        pixels, labels, rows = [], [], []
        for seed in seeds:
            scene = Scene(seed)
            pixels.append(np.asarray(scene.image))
            labels.append({**scene.labels(), **describe(scene)})
            if self.tokenizer is not None:
                rows.append(self.pack(scene.questions(), scene.rng, single=self.stop is not None))
        return Batch(
            pixels=torch.from_numpy(np.stack(pixels)),
            labels={k: torch.from_numpy(np.stack([one[k] for one in labels])) for k in labels[0]},
            **columns(rows),
        )

    def __iter__(self) -> Iterator[Batch]:
        if torch.utils.data.get_worker_info() is not None:
            torch.set_num_threads(1)
        seed = self.first_seed
        while self.stop is None or seed < self.stop:
            yield self._make(range(seed, seed + self.batch))
            seed += self.batch

    def loader(self, workers: int = 1) -> torch.utils.data.DataLoader[Batch]:
        """Iterate in a process of its own, six batches ahead; ``workers`` 0 draws them in this one."""
        prefetch = 6 if workers else None
        return torch.utils.data.DataLoader(self, batch_size=None, num_workers=workers, prefetch_factor=prefetch)


def attention_inputs(batch: Conversations, prefix: int = PREFIX_TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive mask [B, 1, T, T] and positions [B, T] of a prefix all see and the packed conversations.

    Args:
        batch: with conversations.
        prefix: tokens before the first question; by default the user token and one image.
    """
    size = batch.segments.shape[0]
    segments = torch.cat([torch.zeros(size, prefix, dtype=torch.long), batch.segments], 1)
    positions = torch.cat([torch.arange(prefix).expand(size, -1), batch.positions + prefix], 1)
    n = segments.shape[1]
    see = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    see &= torch.ones(n, n, dtype=torch.bool).tril()
    return torch.zeros(size, 1, n, n, dtype=COMPUTE).masked_fill_(~see[:, None], HIDDEN), positions


def thin_background(labels: Labels, mask: torch.Tensor, share: float, generator: torch.Generator) -> None:
    """Hide background from every query, in place.

    Args:
        labels: tell which patches hold a shape or glyph.
        mask: [B, 1, T, T] from :func:`attention_inputs`.
        share: in this share of the scenes, 0 to 90 % of the other patches are hidden.
        generator: draws scenes, rates and patches.
    """
    front = foreground(labels)
    scenes = front.shape[0]
    chosen = torch.rand(scenes, 1, generator=generator) < share
    rate = torch.rand(scenes, 1, generator=generator) * 0.9 * chosen
    hidden = ~front & (torch.rand(front.shape, generator=generator) < rate)
    mask[:, 0, :, 1:PREFIX_TOKENS].masked_fill_(hidden[:, None, :], HIDDEN)
