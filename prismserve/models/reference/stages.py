"""The training stages: vision warm-up, and the joint stage (with or without thinned background)."""

from __future__ import annotations

import collections
import logging
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch
import torch.nn.functional as F

from prismserve.models.reference.build import save
from prismserve.models.reference.data import Conversations, Scenes, attention_inputs, thin_background
from prismserve.models.reference.forward import COMPUTE, Seen, embed, project, text, vision
from prismserve.models.reference.heads import Heads, told
from prismserve.models.reference.optimizer import Optimizers
from prismserve.models.reference.scenes import HELD_OUT_SEED
from prismserve.models.reference.vocabulary import FAMILIES

logger = logging.getLogger(__name__)

VALIDATION_SEED: Final = HELD_OUT_SEED - 100_000
_HEADS_RATE: Final = 2e-3

_Function = TypeVar("_Function", bound=Callable[..., Any])
Encode = Callable[[torch.Tensor], Seen]
Decode = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class VisionOptions:
    """The warm-up.

    Attributes:
        rate: peak learning rate.
        compiled: run through ``torch.compile``.
        workers: processes that draw scenes; 0 draws them in this one.
    """

    steps: int = 1600
    batch: int = 32
    rate: float = 2.5e-3
    warmup_steps: int = 100
    first_seed: int = 1_000_000
    report_steps: int = 100
    compiled: bool = True
    workers: int = 1


@dataclass(frozen=True, slots=True)
class JointOptions:
    """The joint stage.

    Attributes:
        minutes: end early after this long, annealed.
        rate: peak learning rate of the text model and projector; the vision tower has half.
        auxiliary: weight of the heads' losses.
        background_drop: share of the scenes whose background is thinned.
        save_steps: validate and save this often, and at the end.
        validation_scenes: how many held-out scenes to validate on.
    """

    steps: int = 4600
    minutes: float = 1e9
    batch: int = 16
    rate: float = 2e-3
    warmup_steps: int = 200
    auxiliary: float = 0.2
    background_drop: float = 0.0
    first_seed: int = 3_000_000
    report_steps: int = 50
    save_steps: int = 400
    validation_scenes: int = 160
    compiled: bool = True
    workers: int = 1


def maybe_compile(function: _Function, *, compiled: bool) -> _Function:
    """``function``, through ``torch.compile`` if asked for."""
    return cast("_Function", torch.compile(function)) if compiled else function


def train_vision(model: Any, options: VisionOptions) -> Heads:
    """Warm up ``model``'s vision tower in place on dense labels and a description of the scene.

    Returns:
        The heads, for the joint stage to go on with.
    """
    tower = model.model.vision_tower
    heads = Heads(tower.config.hidden_size)

    def see(pixels: torch.Tensor) -> Seen:
        return vision(tower, pixels)

    run = maybe_compile(see, compiled=options.compiled)
    optimizer = Optimizers((tower, options.rate), (heads, options.rate))
    scenes = Scenes(None, options.first_seed, options.batch).loader(options.workers)
    start = time.monotonic()
    for step, batch in zip(range(options.steps), scenes, strict=False):
        optimizer.set_rate(step, step / options.steps, options.warmup_steps)
        loss, hits = heads(run(batch.pixels), batch.labels)
        optimizer.update(loss)
        if step % options.report_steps == 0 or step == options.steps - 1:
            seconds = time.monotonic() - start
            speed = (step + 1) * options.batch / seconds
            logger.info("vision %d loss %.3f %s %.0f img/s", step + 1, loss.item(), told(hits), speed)
    return heads


def train_joint(model: Any, heads: Heads, processor: Any, out: Path, options: JointOptions) -> list[float]:
    """Train the whole model in place on answer tokens, plus a share of the heads' losses; saves to ``out``.

    Returns:
        The answer loss of every step.
    """
    m = model.model
    encode, decode = _passes(model, compiled=options.compiled)
    optimizer = Optimizers(
        (m.language_model, options.rate),
        (m.multi_modal_projector, options.rate),
        (m.vision_tower, options.rate / 2),
        (heads, _HEADS_RATE),
    )
    scenes = Scenes(processor.tokenizer, options.first_seed, options.batch).loader(options.workers)
    thinning = torch.Generator().manual_seed(0)
    start = time.monotonic()
    losses: list[float] = []
    for step, batch in zip(range(options.steps), scenes, strict=False):
        progress = max((step + 1) / options.steps, (time.monotonic() - start) / 60 / options.minutes)
        optimizer.set_rate(step, progress, options.warmup_steps)
        mask, positions = attention_inputs(batch)
        if options.background_drop:
            thin_background(batch.labels, mask, options.background_drop, thinning)
        seen = encode(batch.pixels)
        answer_loss = take_answer_loss(m.language_model, decode(seen[0], batch.ids, mask, positions), batch)
        auxiliary_loss, hits = heads(seen, batch.labels)
        optimizer.update(answer_loss + options.auxiliary * auxiliary_loss)
        losses.append(answer_loss.item())
        last = progress >= 1
        if (step + 1) % options.report_steps == 0 or last:
            recent = statistics.fmean(losses[-options.report_steps :])
            speed = (step + 1) * options.batch / (time.monotonic() - start)
            logger.info("joint %d loss %.4f %s %.1f img/s", step + 1, recent, told(hits), speed)
        if (step + 1) % options.save_steps == 0 or last:
            score = validate(encode, decode, model, processor.tokenizer, options)
            logger.info("joint %d validation mean %.3f %s", step + 1, statistics.fmean(score.values()), told(score))
            save(model, processor, out)
        if last:
            break
    return losses


def _passes(model: Any, *, compiled: bool) -> tuple[Encode, Decode]:
    m = model.model

    def encode(pixels: torch.Tensor) -> Seen:
        return vision(m.vision_tower, pixels)

    def decode(patches: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        tokens = project(m.multi_modal_projector, patches)
        return text(m.language_model, embed(m.language_model, tokens, ids), mask, positions)

    return maybe_compile(encode, compiled=compiled), maybe_compile(decode, compiled=compiled)


def take_answer_loss(lm: Any, hidden: torch.Tensor, batch: Conversations) -> torch.Tensor:
    """Cross-entropy of the answer tokens, the rows of every other position left out of the head."""
    answers = batch.targets >= 0
    text_tokens = batch.targets.shape[1]
    logits = F.linear(hidden[:, -text_tokens:][answers], lm.embed_tokens.weight.to(COMPUTE)).float()
    return F.cross_entropy(logits, batch.targets[answers])


def count_right(
    lm: Any,
    hidden: torch.Tensor,
    batch: Conversations,
    right: collections.Counter[str],
    total: collections.Counter[str],
) -> None:
    """Add up teacher-forced exact matches per family.

    An answer counts where every token of it is the most likely one, so greedy decoding would return it.

    Args:
        lm: the text model, for its tied head.
        hidden: [B, T, D] from ``forward.text``.
        batch: with the answers.
        right: counts to add to.
        total: counts to add to.
    """
    guess = F.linear(hidden[:, -batch.targets.shape[1] :], lm.embed_tokens.weight.to(COMPUTE)).argmax(-1)
    for row, spans in enumerate(batch.spans):
        for family, start, slots in spans:
            total[family] += 1
            answer = slice(start, start + slots)
            right[family] += bool((guess[row, answer] == batch.targets[row, answer]).all())


def validate(encode: Encode, decode: Decode, model: Any, tokenizer: Any, options: JointOptions) -> dict[str, float]:
    """Teacher-forced exact match per family on scenes never trained on; 0 for a family that was not asked."""
    right: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    stop = VALIDATION_SEED + options.validation_scenes
    with torch.no_grad():
        for batch in Scenes(tokenizer, VALIDATION_SEED, options.batch, stop).loader(options.workers):
            mask, positions = attention_inputs(batch)
            hidden = decode(encode(batch.pixels)[0], batch.ids, mask, positions)
            count_right(model.model.language_model, hidden, batch, right, total)
    return shares(right, total, FAMILIES)


def shares(
    right: collections.Counter[str], total: collections.Counter[str], families: Iterable[str]
) -> dict[str, float]:
    """Right over asked of each family; 0 for one that was not asked."""
    return {family: right[family] / max(1, total[family]) for family in families}
