"""Training of the decoder on clips, behind a vision tower and projector that stay as they are.

A clip costs most in the tower, so its tokens are kept and it is asked about again: a step sees some new clips and some
seen before. Of most clips only the tokens that show a shape and a part of the background are there, at their own
positions, which is cheaper still and teaches the decoder not to lean on background.
"""

from __future__ import annotations

import collections
import logging
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from prismserve.core.errors import ConfigurationError
from prismserve.models.reference.clip_data import PREFIX_TOKENS, Asker, ClipBatch, ClipHeads, Watched, labels
from prismserve.models.reference.clip_model import TRAINED_FILE, save_trained
from prismserve.models.reference.clip_questions import CLIP_FAMILIES, drill
from prismserve.models.reference.clips import HELD_OUT_SEED, SIDE, TOKENS, Clip
from prismserve.models.reference.data import attention_inputs
from prismserve.models.reference.forward import COMPUTE, blocks, embed, final_norm, project, vision
from prismserve.models.reference.heads import Hits, told
from prismserve.models.reference.optimizer import descend, set_rate
from prismserve.models.reference.stages import count_right, shares, take_answer_loss

logger = logging.getLogger(__name__)

VALIDATION_SEED: Final = HELD_OUT_SEED - 100_000
STATE_FILE: Final = "training.pt"
TAPPED_LAYERS: Final = 3
"""After so many decoder layers the heads read the clip's tokens."""
_HEADS_RATE: Final = 2e-3
_BANK_CLIPS: Final = 4096


@dataclass(frozen=True, slots=True)
class ClipOptions:
    """The stage.

    Attributes:
        minutes: end early after this long, annealed.
        batch: clips a step.
        fresh: how many of them are new.
        rate: peak learning rate of the decoder.
        auxiliary: weight of the heads' losses.
        visible: tokens of a clip in most steps.
        whole_steps: every so many steps all tokens are there.
        drilled: share of the clips that are also asked what is learnt last.
        choice: of so many clips drawn, every other new one is that about which most of it can be asked.
        save_steps: validate and save this often, and at the end.
        validation_clips: how many clips to validate on.
    """

    steps: int = 24_000
    minutes: float = 1e9
    batch: int = 4
    fresh: int = 1
    rate: float = 6e-4
    warmup_steps: int = 40
    auxiliary: float = 0.2
    visible: int = 64
    whole_steps: int = 8
    drilled: float = 0.5
    choice: int = 3
    first_seed: int = 1_000_000
    report_steps: int = 50
    save_steps: int = 200
    validation_clips: int = 32

    def seeds(self, index: int) -> range:
        """Of the new clip with this number, from 0: one seed, or those to choose from."""
        first = self.first_seed + index * self.choice
        return range(first, first + (self.choice if index % 2 else 1))


@dataclass(slots=True)
class Progress:
    """Where training stands.

    Attributes:
        step: steps done.
        seconds: spent on them.
        losses: of the answers, one a step.
    """

    step: int
    seconds: float
    losses: list[float]


def richest(seeds: range) -> Clip:
    """The clip of several about which most different things are asked in :func:`drill`; the first of those."""
    return max((Clip(seed) for seed in seeds), key=lambda clip: len({(q[0], q[2]) for q in drill(clip.actors)}))


def watch(model: Any, clip: Clip) -> Watched:
    """A clip as the decoder gets it, whatever is trained."""
    m = model.model
    with torch.no_grad():
        patches = vision(m.vision_tower, torch.from_numpy(clip.frames))[0]
        tokens = clip_tokens(m, patches)
    truth = {name: torch.from_numpy(value) for name, value in labels(clip).items()}
    return Watched(tokens.to(torch.bfloat16), truth, clip.actors)


def clip_tokens(m: Any, patches: torch.Tensor) -> torch.Tensor:
    """Patches [F, 196, C] of a clip to decoder inputs [F * 49 + 1, D]: projected, averaged, one token behind."""
    tokens = project(m.multi_modal_projector, patches)
    tokens = tokens.view(-1, SIDE, 2, SIDE, 2, tokens.shape[-1]).float().mean((2, 4))
    return torch.cat([tokens.reshape(TOKENS, -1), m.image_newline.float()[None]])


def forward(model: Any, batch: ClipBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """States after ``TAPPED_LAYERS`` layers of the clip's tokens [B, K, D] and the last of all positions [B, T, D]."""
    lm, visible = model.model.language_model, batch.places.shape[1]
    prefix = visible + 2
    mask, positions = attention_inputs(batch, prefix)
    positions[:, prefix:] += PREFIX_TOKENS - prefix
    positions[:, 1 : 1 + visible] = batch.places + 1
    positions[:, prefix - 1] = PREFIX_TOKENS - 1
    x = embed(lm, batch.tokens.to(COMPUTE), batch.ids)
    middle = blocks(lm.config, lm.layers[:TAPPED_LAYERS], x, mask, positions)
    last = blocks(lm.config, lm.layers[TAPPED_LAYERS:], middle, mask, positions)
    return middle[:, 1 : 1 + visible], final_norm(lm, last)


class Trainer:
    """One run, which goes on from what an earlier one left in ``out``.

    Raises:
        ConfigurationError: the state in ``out`` is of a run with another number of new clips a step.
    """

    def __init__(self, model: Any, tokenizer: Any, out: Path, options: ClipOptions) -> None:
        self.model, self.out, self.options = model, out, options
        self.asker = Asker(tokenizer)
        self.heads = ClipHeads(model.config.text_config.hidden_size)
        self._lm = model.model.language_model
        groups = [(self._lm, options.rate), (self.heads, _HEADS_RATE)]
        self._optimizer = torch.optim.AdamW(
            [{"params": list(module.parameters()), "lr": rate, "base": rate} for module, rate in groups],
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )
        self.progress = self._resumed()
        self._bank: list[Watched] = []
        self._validation: list[Watched] = []

    def train(self) -> Progress:
        """Train the model in place; saves to ``out``."""
        options, done = self.options, self.progress
        start = time.monotonic() - done.seconds
        if not done.step:
            logger.info("clips 0 validation %s", told(self.validate()))
        while True:
            done.seconds = time.monotonic() - start
            share = max((done.step + 1) / options.steps, done.seconds / 60 / options.minutes)
            loss, hits = self._step(share)
            done.losses.append(loss)
            done.step += 1
            if done.step % options.report_steps == 0 or share >= 1:
                recent = statistics.fmean(done.losses[-options.report_steps :])
                speed = done.step / (time.monotonic() - start)
                logger.info("clips %d loss %.4f %s %.2f steps/s", done.step, recent, told(hits), speed)
            if done.step % options.save_steps == 0 or share >= 1:
                score = self.validate()
                mean = statistics.fmean(score.values())
                logger.info("clips %d validation mean %.3f %s", done.step, mean, told(score))
                self._save()
            if share >= 1:
                return done

    def _step(self, share: float) -> tuple[float, Hits]:
        options, step = self.options, self.progress.step
        set_rate(self._optimizer.param_groups, step, share, options.warmup_steps)
        rng = np.random.default_rng([step, 5])
        visible = TOKENS if step % options.whole_steps == options.whole_steps - 1 else options.visible
        batch = self.asker.ask_about(self._clips(rng), visible, rng, single=False, drilled=options.drilled)
        middle, last = forward(self.model, batch)
        answer_loss = take_answer_loss(self._lm, last, batch)
        auxiliary_loss, hits = self.heads(middle, batch.labels)
        descend(answer_loss + options.auxiliary * auxiliary_loss, [self._optimizer])
        return answer_loss.item(), hits

    def _clips(self, rng: np.random.Generator) -> list[Watched]:
        """Some new clips, and others at random from those seen before; at first all are new."""
        options, first = self.options, self.progress.step * self.options.fresh
        fresh = [watch(self.model, richest(options.seeds(first + i))) for i in range(options.fresh)]
        self._bank = [*self._bank[-_BANK_CLIPS + options.fresh :], *fresh]
        picks = rng.integers(len(self._bank), size=options.batch - options.fresh)
        return [*fresh, *(self._bank[i] for i in picks)]

    def validate(self) -> dict[str, float]:
        """Teacher-forced exact match per family on clips never trained on; 0 for a family that was not asked."""
        right: collections.Counter[str] = collections.Counter()
        total: collections.Counter[str] = collections.Counter()
        if not self._validation:
            seeds = range(VALIDATION_SEED, VALIDATION_SEED + self.options.validation_clips)
            self._validation = [watch(self.model, Clip(seed)) for seed in seeds]
        rng = np.random.default_rng(0)
        size = self.options.batch
        with torch.no_grad():
            for first in range(0, len(self._validation), size):
                batch = self.asker.ask_about(self._validation[first : first + size], TOKENS, rng, single=True)
                count_right(self._lm, forward(self.model, batch)[1], batch, right, total)
        return shares(right, total, CLIP_FAMILIES)

    def _save(self) -> None:
        """What was trained, and everything a later run needs but the clips; the state takes its place at once."""
        save_trained(self.model, self.out / TRAINED_FILE)
        state = {
            "fresh": self.options.fresh,
            "step": self.progress.step,
            "seconds": self.progress.seconds,
            "losses": self.progress.losses,
            "decoder": self._lm.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        part = self.out / f"{STATE_FILE}.part"
        torch.save(state, part)
        part.replace(self.out / STATE_FILE)

    def _resumed(self) -> Progress:
        path = self.out / STATE_FILE
        if not path.is_file():
            return Progress(0, 0.0, [])
        state = torch.load(path, weights_only=True)
        if state["fresh"] != self.options.fresh:
            message = f"{path} is of a run with {state['fresh']} new clips a step; go on with the same"
            raise ConfigurationError(message, field="fresh")
        self._lm.load_state_dict(state["decoder"])
        self.heads.load_state_dict(state["heads"])
        self._optimizer.load_state_dict(state["optimizer"])
        logger.info("going on after step %d", state["step"])
        return Progress(state["step"], state["seconds"], state["losses"])
