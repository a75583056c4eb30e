"""Exact match of greedy generation per question family, on scenes never trained on.

Run it with::

    python -m prismserve.models.reference.evaluate                    # the bundled weights, 250 questions a family
    python -m prismserve.models.reference.evaluate --model OUT --per-family 50 --ablation
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from prismserve.core.errors import ConfigurationError, PrismServeError
from prismserve.models.reference import reference_path
from prismserve.models.reference.scenes import HELD_OUT_SEED, make_scene
from prismserve.models.reference.vocabulary import FAMILIES

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about one image."""

    image: Image.Image
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class FamilyScore:
    """How a family fared.

    Attributes:
        right: exact matches.
        asked: questions.
        misses: (question, expected, said) of the wrong ones.
    """

    right: int
    asked: int
    misses: tuple[tuple[str, str, str], ...]


def held_out_questions(per_family: int, first_seed: int = HELD_OUT_SEED) -> dict[str, list[Asked]]:
    """The first ``per_family`` questions of every family, scene by scene from ``first_seed``."""
    asked: dict[str, list[Asked]] = {family: [] for family in FAMILIES}
    seed = first_seed
    while min(map(len, asked.values())) < per_family:
        image, questions = make_scene(seed)
        seed += 1
        for family, question, answer in questions:
            if len(asked[family]) < per_family:
                asked[family].append(Asked(image, question, answer))
    return asked


def answers(model: Any, processor: Any, questions: Sequence[Asked], max_new_tokens: int) -> list[str]:
    """Greedy answers of one batch, through the chat template."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.question}]}],
            add_generation_prompt=True,
        )
        for one in questions
    ]
    inputs = processor(images=[one.image for one in questions], text=prompts, padding=True, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens)[:, inputs["input_ids"].shape[1] :]
    return [said.strip() for said in processor.batch_decode(ids, skip_special_tokens=True)]


def generate_accuracy(
    directory: Path, per_family: int = 250, batch: int = 50, max_new_tokens: int = 48
) -> dict[str, FamilyScore]:
    """Ask a saved bfloat16 model through its own processor.

    Args:
        directory: a checkpoint directory.
        per_family: questions of each family.
        batch: questions answered at once.
        max_new_tokens: longest answer; answers need at most 20.

    Returns:
        The score of every family.

    Raises:
        ConfigurationError: ``directory`` holds no saved model.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    if not (directory / "config.json").is_file():
        message = f"{directory} holds no saved model"
        raise ConfigurationError(message, field="model")
    processor = AutoProcessor.from_pretrained(directory)
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16).eval()
    scores = {}
    for family, questions in held_out_questions(per_family).items():
        misses = []
        for start in range(0, len(questions), batch):
            part = questions[start : start + batch]
            said = answers(model, processor, part, max_new_tokens)
            misses += [
                (one.question, one.answer, text) for one, text in zip(part, said, strict=True) if text != one.answer
            ]
        scores[family] = FamilyScore(len(questions) - len(misses), len(questions), tuple(misses))
        logger.info("%s %d of %d, misses: %s", family, scores[family].right, len(questions), misses[:3])
    return scores


def table(scores: dict[str, FamilyScore]) -> str:
    """The scores as a Markdown table with a last row over all of them."""
    rows = ["| family | right / asked | accuracy |", "|---|---|---|"]
    rows += [f"| {f} | {s.right} / {s.asked} | {s.right / s.asked:.1%} |" for f, s in scores.items()]
    right, asked = sum(s.right for s in scores.values()), sum(s.asked for s in scores.values())
    return "\n".join([*rows, f"| **all** | {right} / {asked} | {right / asked:.1%} |"])


def report(scores: dict[str, FamilyScore]) -> None:
    """Log the table."""
    logger.info("%s", table(scores))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        message = f"{value} must be at least 1"
        raise argparse.ArgumentTypeError(message)
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint directory; 1 with one sentence on standard error if it cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m prismserve.models.reference.evaluate", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", type=Path, help="checkpoint directory; the bundled model if absent")
    parser.add_argument("--per-family", type=_positive, default=250, help="questions of each family")
    parser.add_argument("--batch", type=_positive, default=50, help="questions answered at once")
    parser.add_argument("--ablation", action="store_true", help="also accuracy with image tokens removed")
    parser.add_argument("--ablation-scenes", type=_positive, default=640)
    parser.add_argument("--threads", type=_positive, default=os.cpu_count() or 1, help="CPU threads")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(parsed.threads)
    try:
        directory = parsed.model or reference_path()
        report(generate_accuracy(directory, parsed.per_family, parsed.batch))
        if parsed.ablation:
            from prismserve.models.reference.ablation import ablation

            ablation(directory, scenes=parsed.ablation_scenes)
    except PrismServeError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
