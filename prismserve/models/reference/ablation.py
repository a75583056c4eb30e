"""Accuracy with some image tokens removed between projector and text model.

A removed token is hidden from every query, which is the same as not being there. *compact* renumbers the positions of
what is left, *original* keeps them.
"""

from __future__ import annotations

import collections
import logging
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F

from prismserve.models.reference.data import Batch, Scenes, attention_inputs
from prismserve.models.reference.forward import HIDDEN, PREFIX_TOKENS, embed, project, text, vision
from prismserve.models.reference.heads import attention_auc, foreground
from prismserve.models.reference.scenes import HELD_OUT_SEED
from prismserve.models.reference.stages import count_right, maybe_compile
from prismserve.models.reference.vocabulary import FAMILIES, IMAGE_TOKENS

logger = logging.getLogger(__name__)

_LAST: Final = "CLS attention, last layer"
_SECOND_LAST: Final = "CLS attention, second-last layer"
_DIVERSITY: Final = "diversity"
_FOREGROUND: Final = "foreground first"
_RANDOM: Final = "random"
_ZERO: Final = "projector output zeroed"
_SWAP: Final = "image of another scene"


@dataclass(frozen=True, slots=True)
class Condition:
    """What is done to the image tokens: rank by ``kind``, keep ``share``, and renumber if ``compact``."""

    kind: str
    share: float = 1.0
    compact: bool = False

    @property
    def name(self) -> str:
        """As the table's first column has it."""
        if self.kind in ("all tokens", _ZERO, _SWAP):
            return self.kind
        return f"{self.kind} {self.share:.2%}, {'compact' if self.compact else 'original'}"


def conditions() -> Iterator[Condition]:
    """Every row of the table."""
    yield Condition("all tokens")
    for share in (0.75, 0.5, 0.25, 0.125, 0.0625):
        yield from (Condition(_RANDOM, share, compact) for compact in (False, True))
    for share in (0.5, 0.25, 0.125):
        yield from (Condition(_FOREGROUND, share, compact) for compact in (False, True))
    for kind in (_LAST, _SECOND_LAST, _DIVERSITY):
        yield from (Condition(kind, share) for share in (0.5, 0.25, 0.125))
    yield Condition(_ZERO)
    yield Condition(_SWAP)


def farthest_first(tokens: torch.Tensor, picks: int) -> torch.Tensor:
    """Score tokens by when greedy max-min selection takes them (cosine distance, as in DivPrune).

    Args:
        tokens: [B, N, D].
        picks: how many are taken; the others score 0.

    Returns:
        [B, N] float32, larger is earlier.
    """
    x = F.normalize(tokens.float(), dim=-1)
    rows = torch.arange(tokens.shape[0])
    distance = 1 - x @ x.transpose(1, 2)
    nearest = (distance + 9 * torch.eye(x.shape[1])).amin(-1)  # the first pick is farthest from its neighbor
    score = torch.zeros(x.shape[:2])
    for i in range(picks):
        pick = nearest.argmax(-1)
        score[rows, pick] = picks - i
        nearest = torch.minimum(nearest, distance[rows, pick]) if i else distance[rows, pick].clone()
        nearest[score > 0] = -1
    return score


def _treat(
    condition: Condition,
    scores: Mapping[str, torch.Tensor],
    tokens: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and positions under a condition; what is passed in stays as it is."""
    if condition.kind == _ZERO:
        return torch.zeros_like(tokens), mask, positions
    if condition.kind == _SWAP:
        return tokens.roll(1, 0), mask, positions
    if condition.kind not in scores:
        return tokens, mask, positions
    kept = round(condition.share * IMAGE_TOKENS)
    keep = scores[condition.kind].argsort(1, descending=True).argsort(1) < kept
    mask = mask.clone()
    mask[:, 0, :, 1:PREFIX_TOKENS].masked_fill_(~keep[:, None, :], HIDDEN)
    if condition.compact:
        positions = positions.clone()
        positions[:, 1:PREFIX_TOKENS] = keep.long().cumsum(1)
        positions[:, PREFIX_TOKENS:] -= IMAGE_TOKENS - kept
    return tokens, mask, positions


def _scores(
    tokens: torch.Tensor, looks: torch.Tensor, batch: Batch, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    noise = torch.rand(tokens.shape[:2], generator=generator)
    return {
        _RANDOM: noise,
        _FOREGROUND: noise + 2 * foreground(batch.labels).float(),
        _LAST: looks[-1],
        _SECOND_LAST: looks[-2],
        _DIVERSITY: farthest_first(tokens, IMAGE_TOKENS // 2),
    }


def ablation(
    directory: Path, scenes: int = 640, batch: int = 16, *, compiled: bool = True, workers: int = 1
) -> dict[str, dict[str, float]]:
    """Teacher-forced exact match under every condition; logs the table and the AUC of the class token's attention.

    Args:
        directory: a checkpoint directory.
        scenes: held-out scenes.
        batch: scenes at once, at least 2 so that images can be swapped.
        compiled: run through ``torch.compile``.
        workers: processes that draw scenes.

    Returns:
        Accuracy by condition and family; families that were not asked are left out.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    tokenizer = AutoProcessor.from_pretrained(directory).tokenizer
    m = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval().model
    lm = m.language_model

    def see(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches, _, looks = vision(m.vision_tower, pixels)
        return project(m.multi_modal_projector, patches), looks

    def read(tokens: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return text(lm, embed(lm, tokens, ids), mask, positions)

    see, read = maybe_compile(see, compiled=compiled), maybe_compile(read, compiled=compiled)
    generator = torch.Generator().manual_seed(0)
    right: dict[str, collections.Counter[str]] = {c.name: collections.Counter() for c in conditions()}
    total: dict[str, collections.Counter[str]] = {c.name: collections.Counter() for c in conditions()}
    auc = []
    with torch.no_grad():
        for part in Scenes(tokenizer, HELD_OUT_SEED, batch, HELD_OUT_SEED + scenes).loader(workers):
            tokens, looks = see(part.pixels)
            auc.append(attention_auc(looks, foreground(part.labels)))
            scores = _scores(tokens, looks, part, generator)
            mask, positions = attention_inputs(part)
            for condition in conditions():
                seen, hidden_from, places = _treat(condition, scores, tokens, mask, positions)
                hidden = read(seen, part.ids, hidden_from, places)
                count_right(lm, hidden, part, right[condition.name], total[condition.name])
    result = {name: {f: right[name][f] / total[name][f] for f in FAMILIES if total[name][f]} for name in right}
    _report(result)
    layers = torch.cat(auc, 1)[:, :300].mean(1)
    logger.info("AUC of CLS attention, first to last layer: %s", " ".join(f"{v:.3f}" for v in layers))
    return result


def _report(result: Mapping[str, Mapping[str, float]]) -> None:
    rows = ["| image tokens | mean | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 2) + "|"]
    for name, by_family in result.items():
        cells = [f"{by_family[f]:.3f}" if f in by_family else "-" for f in FAMILIES]
        rows.append(f"| {name} | {statistics.fmean(by_family.values()):.3f} | " + " | ".join(cells) + " |")
    logger.info("%s", "\n".join(rows))
