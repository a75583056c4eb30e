"""Auxiliary heads that teach the vision tower what is where; used in training only and thrown away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from prismserve.models.reference.forward import Seen
from prismserve.models.reference.scenes import Scene
from prismserve.models.reference.vocabulary import CHARS, COLOR_NAMES, GRID, SHAPES, SIZE_NAMES, WORDS

Labels = Mapping[str, torch.Tensor]
"""Per-patch classes [B, 196] from ``Scene.labels`` and per-scene truths from :func:`describe`."""
Hits = dict[str, float]
"""Share of right guesses per name, for the log."""


def told(values: Hits) -> str:
    """Shares as the log tells them."""
    return " ".join(f"{name} {value:.2f}" for name, value in values.items())


def describe(scene: Scene) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """What the class token is asked for.

    Returns:
        ``present``: float32 flags of the shapes, colors, shape-color pairs and glyphs in the scene; ``count``: how
        many objects; ``word``: 1 + the word's number, 0 if there is none.
    """
    pair = np.zeros((len(SHAPES), len(COLOR_NAMES)), np.float32)
    for drawn in scene.objects:
        pair[SHAPES.index(drawn.shape), COLOR_NAMES.index(drawn.color)] = 1
    glyphs = np.array([c in scene.text.upper() for c in CHARS], np.float32)
    word = WORDS.index(scene.text) + 1 if scene.text_kind == "word" else 0
    return {
        "present": np.concatenate([pair.max(1), pair.max(0), pair.reshape(-1), glyphs]),
        "count": np.array(len(scene.objects), np.int64),
        "word": np.array(word, np.int64),
    }


def foreground(labels: Labels) -> torch.Tensor:
    """The patches that hold a shape or a glyph, [B, 196] bool."""
    return (labels["shape"] > 0) | (labels["char"] > 0)


def attention_auc(score: torch.Tensor, front: torch.Tensor) -> torch.Tensor:
    """Chance that a foreground patch outranks a background patch of the same scene: [..., B, 196] to [..., B]."""
    rank = score.argsort(-1).argsort(-1).float()
    n = front.sum(-1).float()
    return ((rank * front).sum(-1) - n * (n - 1) / 2) / (n * (front.shape[-1] - n))


class TokenClassifiers(torch.nn.Module):
    """Linear classifiers of normalised tokens, a class number for each name of ``CLASSES``."""

    CLASSES: ClassVar[dict[str, int]]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.out = torch.nn.Linear(width, sum(self.CLASSES.values()))

    def guesses(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """[..., C] tokens to logits [..., classes] by name."""
        logits = torch.split(self.out(self.norm(tokens.float())), list(self.CLASSES.values()), -1)
        return dict(zip(self.CLASSES, logits, strict=True))


class DenseHead(TokenClassifiers):
    """A linear classifier of every patch; background counts 0.15 as much as the rest."""

    CLASSES: ClassVar[dict[str, int]] = {
        "shape": len(SHAPES) + 1,
        "color": len(COLOR_NAMES) + 1,
        "size": len(SIZE_NAMES) + 1,
        "center": 2,
        "char": len(CHARS) + 1,
        "index": 6,
        "row": GRID + 1,
        "col": GRID + 1,
    }

    def forward(self, patches: torch.Tensor, labels: Labels) -> tuple[torch.Tensor, Hits]:
        """[B, 196, C] patches to the summed cross-entropy and the share right off the background."""
        losses, hits = [], {}
        for name, guess in self.guesses(patches).items():
            truth, classes = labels[name], self.CLASSES[name]
            weight = torch.ones(classes)
            weight[0] = 0.15
            losses.append(F.cross_entropy(guess.reshape(-1, classes), truth.reshape(-1), weight=weight))
            right = (guess.argmax(-1) == truth)[truth > 0]
            hits[name] = float(right.float().mean()) if right.numel() else 1.0
        return torch.stack(losses).sum(), hits


class SceneHead(torch.nn.Module):
    """A linear description of the whole scene from the class token; see :func:`describe`."""

    CLASSES: ClassVar[dict[str, int]] = {
        "present": len(SHAPES) + len(COLOR_NAMES) + len(SHAPES) * len(COLOR_NAMES) + len(CHARS),
        "count": 6,
        "word": len(WORDS) + 1,
    }

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = torch.nn.Linear(width, sum(self.CLASSES.values()))

    def forward(self, pooled: torch.Tensor, labels: Labels) -> tuple[torch.Tensor, Hits]:
        """[B, C] class tokens to the summed loss and the share right."""
        present, count, word = torch.split(self.out(pooled.float()), list(self.CLASSES.values()), -1)
        flags = F.binary_cross_entropy_with_logits(present, labels["present"]) * self.CLASSES["present"] / 10
        loss = flags + F.cross_entropy(count, labels["count"]) + F.cross_entropy(word, labels["word"])
        there = labels["present"] > 0
        return loss, {
            "cls-present": float((present > 0)[there].float().mean()),
            "cls-n": float((count.argmax(-1) == labels["count"]).float().mean()),
            "cls-word": float((word.argmax(-1) == labels["word"]).float().mean()),
        }


class Heads(torch.nn.Module):
    """Both heads; reports how often they are right and the AUC of the class token's attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches, self.scene = DenseHead(width), SceneHead(width)

    def forward(self, seen: Seen, labels: Labels) -> tuple[torch.Tensor, Hits]:
        """What ``forward.vision`` returned, to the sum of both losses and every hit rate."""
        patches, pooled, looks = seen
        dense, dense_hits = self.patches(patches, labels)
        scene, scene_hits = self.scene(pooled, labels)
        auc = attention_auc(looks[-2:].detach(), foreground(labels))
        ranks = {"auc-2": float(auc[0].mean()), "auc-1": float(auc[1].mean())}
        return dense + scene, {**dense_hits, **scene_hits, **ranks}
