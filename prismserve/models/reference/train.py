r"""Train the reference model from scratch on a CPU.

Run it with::

    python -m prismserve.models.reference.train --out OUT                  # tokenizer, both stages, evaluation
    python -m prismserve.models.reference.train --out OUT --stage joint --init OUT --lr 1e-3 \
        --first-seed 5000000 --background-drop 0.7 --joint-steps 1470      # then the last stage: thinned background
    python -m prismserve.models.reference.train --out OUT --smoke          # every stage, a few steps each

Stages: (1) a byte-level BPE tokenizer is trained on the questions; (2) the vision tower is warmed up on dense
per-patch labels while its class token learns to describe the scene, the heads being thrown away later; (3) the whole
model is trained on questions, the loss being taken on answer tokens, plus a share of both losses of (2); (4) the same
with background patches hidden at random, so that answers do not lean on them.

``--smoke`` proves that every stage runs and hands over to the next; the model it leaves has learned nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from prismserve.core.errors import ConfigurationError
from prismserve.models.reference.ablation import ablation
from prismserve.models.reference.build import CORPUS_SCENES, build_model, build_processor
from prismserve.models.reference.command import carry_out
from prismserve.models.reference.evaluate import generate_accuracy, report
from prismserve.models.reference.forward import check_forward
from prismserve.models.reference.heads import Heads
from prismserve.models.reference.stages import JointOptions, VisionOptions, train_joint, train_vision

logger = logging.getLogger(__name__)

WARMUP_FILE: Final = "vision-warmup.safetensors"
_SMOKE_STEPS: Final = 2
_SMOKE_CORPUS_SCENES: Final = 100
_SMOKE_VISION: Final = VisionOptions(steps=_SMOKE_STEPS, batch=2, warmup_steps=1, compiled=False, workers=0)
_SMOKE_JOINT: Final = JointOptions(
    steps=_SMOKE_STEPS, batch=2, warmup_steps=1, validation_scenes=2, compiled=False, workers=0
)


def warm_up(model: Any, out: Path, options: VisionOptions) -> Heads:
    """Run the vision stage and keep its result in ``out`` for :func:`restore_warm_up`."""
    heads = train_vision(model, options)
    state = {f"tower.{name}": value for name, value in model.model.vision_tower.state_dict().items()}
    state |= {f"heads.{name}": value for name, value in heads.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, out / WARMUP_FILE)
    return heads


def restore_warm_up(model: Any, out: Path) -> Heads:
    """Load what :func:`warm_up` left into ``model``.

    Raises:
        ConfigurationError: ``out`` holds no warm-up.
    """
    path = out / WARMUP_FILE
    if not path.is_file():
        message = f"{out} holds no {WARMUP_FILE}: run --stage vision first, or name a trained model with --init"
        raise ConfigurationError(message, field="out")
    state = load_file(path)
    heads = Heads(model.config.vision_config.hidden_size)
    heads.load_state_dict({k.removeprefix("heads."): v for k, v in state.items() if k.startswith("heads.")})
    tower = {k.removeprefix("tower."): v for k, v in state.items() if k.startswith("tower.")}
    model.model.vision_tower.load_state_dict(tower)
    return heads


def reload(directory: Path) -> tuple[Any, Any, Heads]:
    """A saved model in float32, its processor (so token numbers stay), and fresh heads.

    Raises:
        ConfigurationError: ``directory`` holds no saved model.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    if not (directory / "config.json").is_file():
        message = f"{directory} holds no saved model to start from"
        raise ConfigurationError(message, field="init")
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).train()
    return model, AutoProcessor.from_pretrained(directory), Heads(model.config.vision_config.hidden_size)


def smoke(out: Path) -> None:
    """Every stage for a few steps: tokenizer, warm-up, joint, thinned background, both evaluations."""
    processor, model = build_processor(_SMOKE_CORPUS_SCENES), build_model()
    logger.info("forward check %.4f", check_forward(model))
    warm_up(model, out, _SMOKE_VISION)
    heads = restore_warm_up(model, out)
    train_joint(model, heads, processor, out, _SMOKE_JOINT)
    model, processor, heads = reload(out)
    train_joint(model, heads, processor, out, dataclasses.replace(_SMOKE_JOINT, background_drop=0.7))
    report(generate_accuracy(out, per_family=1, max_new_tokens=4))
    ablation(out, scenes=2, batch=2, compiled=False, workers=0)
    logger.info("every stage ran; %s holds a model that has learned nothing", out)


def run(arguments: argparse.Namespace) -> None:
    """Carry out parsed arguments."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.smoke:
        smoke(out)
        return
    if arguments.stage != "eval":
        _train(arguments, out)
    if arguments.stage in ("all", "eval"):
        report(generate_accuracy(out))
        ablation(out)


def _train(arguments: argparse.Namespace, out: Path) -> None:
    if arguments.init:
        model, processor, heads = reload(arguments.init)
    else:
        processor, model = build_processor(CORPUS_SCENES), build_model()
        size = sum(p.numel() for p in model.parameters()) / 1e6
        logger.info("parameters %.2fM, forward check %.4f", size, check_forward(model))
        if arguments.stage == "joint":
            heads = restore_warm_up(model, out)
        else:
            heads = warm_up(model, out, VisionOptions(steps=arguments.vision_steps))
    if arguments.stage == "vision":
        return
    options = JointOptions(
        steps=arguments.joint_steps,
        minutes=arguments.joint_minutes,
        rate=arguments.lr,
        first_seed=arguments.first_seed,
        background_drop=arguments.background_drop,
        warmup_steps=max(1, min(200, arguments.joint_steps // 8)),
    )
    train_joint(model, heads, processor, out, options)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        message = f"{value} must be at least 1"
        raise argparse.ArgumentTypeError(message)
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        message = f"{value} must be above 0 and finite"
        raise argparse.ArgumentTypeError(message)
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        message = f"{value} must be from 0 to 1"
        raise argparse.ArgumentTypeError(message)
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m prismserve.models.reference.train", description=__doc__.split("\n")[0]
    )
    out.add_argument("--out", required=True, type=Path, help="directory for the model")
    out.add_argument("--smoke", action="store_true", help="every stage, a few steps each, nothing learned")
    out.add_argument("--stage", default="all", choices=["all", "vision", "joint", "eval"])
    out.add_argument("--init", type=Path, help="with --stage joint: start from this saved model, not from the warm-up")
    out.add_argument("--vision-steps", type=_positive, default=VisionOptions().steps)
    out.add_argument("--joint-steps", type=_positive, default=JointOptions().steps)
    out.add_argument("--joint-minutes", type=_positive_float, default=1e9, help="end the joint stage early, annealed")
    out.add_argument("--lr", type=_positive_float, default=2e-3, help="peak rate of the joint stage (vision: half)")
    out.add_argument("--first-seed", type=_positive, default=3_000_000, help="first scene of the joint stage")
    out.add_argument("--background-drop", type=_share, default=0.0, help="share of scenes with thinned background")
    out.add_argument("--threads", type=_positive, default=os.cpu_count() or 1, help="CPU threads")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, seed, run; 1 with one sentence on standard error if the arguments cannot be carried out."""
    parsed = parser().parse_args(arguments)
    return carry_out(run, parsed)


if __name__ == "__main__":
    sys.exit(main())
