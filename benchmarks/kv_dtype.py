"""What the format of the KV pool costs in quality and saves in memory, on the bundled reference model.

    python -m benchmarks.kv_dtype [--per-family N] [--out FOLDER]

The same held-out questions are asked of one engine per format, in this process, with the weights in float32. Writes
``kv_dtype.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.demo_accuracy import Question, Score, draw_questions
from prismserve.compression.loader import normalise, visual_method
from prismserve.core.prompt import image_key
from prismserve.core.types import (
    CompressionPlan,
    MediaInput,
    MediaSegment,
    Prompt,
    Request,
    SamplingParams,
    TextSegment,
)
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.models.base import VisionLanguageModel
from prismserve.models.loader import load_model
from prismserve.models.processing import ChatMessage, ImageSlot, Processor
from prismserve.models.reference import reference_path
from prismserve.models.reference.scenes import FAMILIES, make_scene

FORMATS: Final = ("auto", "bf16", "fp8", "int8", "int4")
BATCH: Final = 32
_POOL_BYTES: Final = 256 << 20
_ANSWER_TOKENS_MAX: Final = 48


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one format.

    Attributes:
        kv_cache_dtype: as the setting names it.
        token_bytes: KV of one token over all layers.
        families: score by question family.
        total: score over all questions.
        same: answers equal to those of the first format, token for token.
        seconds: all questions took.
    """

    kv_cache_dtype: str
    token_bytes: int
    families: Mapping[str, Score]
    total: Score
    same: int
    seconds: float


def requests(
    model: VisionLanguageModel, processor: Processor, questions: Sequence[Question]
) -> Iterator[tuple[Question, Request]]:
    """Each question with the request that asks it, uncompressed."""
    plan = CompressionPlan(visual=normalise(visual_method("none"), {}, "visual"))
    for number, question in enumerate(questions):
        picture = make_scene(question.seed)[0].convert("RGB")
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        media = MediaInput(stream.getvalue(), hashlib.sha256(picture.tobytes()).digest(), *picture.size)
        tokens = processor.image_tokens(media.width_px, media.height_px)
        key = image_key(media.pixel_hash, processor.fingerprint, model.encoder_fingerprint, plan.visual.fingerprint())
        segments: list[TextSegment | MediaSegment] = []
        run: list[int] = []
        for item in processor.render_chat([ChatMessage("user", (ImageSlot(0), question.text))]):
            if isinstance(item, int):
                run.append(item)
                continue
            segments.append(TextSegment(tuple(run)))
            run = []
            segments.append(MediaSegment(item.index, key, tokens, tokens))
        segments.append(TextSegment(tuple(run)))
        prompt = Prompt(tuple(segment for segment in segments if segment.tokens))
        root = hashlib.sha256(b"kv_dtype").digest()
        sampling = SamplingParams(max_tokens=_ANSWER_TOKENS_MAX)
        yield question, Request(f"q{number}", 0, root, root, prompt, (media,), sampling, plan)


def ask(engine: Engine, processor: Processor, asked: Sequence[Request]) -> list[tuple[str, tuple[int, ...]]]:
    """Text and tokens of each answer; RuntimeError if one fails."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in asked}
    for start in range(0, len(asked), BATCH):
        for request in asked[start : start + BATCH]:
            engine.submit(request, worker="local")
        while engine.has_work:
            for output in engine.step():
                if output.error:
                    raise RuntimeError(output.error)
                tokens[output.request_id].extend(output.token_ids)
    decode = processor.tokenizer.decode
    return [(decode(ids, skip_special_tokens=True).strip(), tuple(ids)) for ids in tokens.values()]


def measure(per_family: int) -> Iterator[Row]:
    """A row for each format."""
    processor = Processor.from_directory(reference_path())
    model = load_model(reference_path(), dtype="float32", device="cpu", progress=None)
    pairs = list(requests(model, processor, draw_questions(per_family)))
    exact: list[tuple[int, ...]] = []
    for name in FORMATS:
        config = EngineConfig(kv_cache_dtype=name, kv_cache_bytes=_POOL_BYTES, max_model_len=1024)
        engine = Engine(model, processor, config)
        started = time.monotonic()
        answers = ask(engine, processor, [request for _, request in pairs])
        seconds = time.monotonic() - started
        engine.check_integrity()
        exact = exact or [tokens for _, tokens in answers]
        right = [question.answer == text for (question, _), (text, _) in zip(pairs, answers, strict=True)]
        families = {
            family: Score(
                sum(hit for hit, (question, _) in zip(right, pairs, strict=True) if question.family == family),
                sum(question.family == family for question, _ in pairs),
            )
            for family in FAMILIES
        }
        same = sum(tokens == first for (_, tokens), first in zip(answers, exact, strict=True))
        yield Row(name, engine.layout.token_bytes, families, Score(sum(right), len(right)), same, seconds)


def markdown(rows: Sequence[Row], conditions: str) -> str:
    """The results as a Markdown page."""
    header = ["KV dtype", "bytes per token", "of auto", *FAMILIES, "all", "95 % interval", "same tokens as auto"]
    lines = [
        "# Accuracy by KV format",
        "",
        conditions,
        "",
        "Exact match in percent, and the share of answers that are the first row's token for token. Heads have 64",
        "channels here; with 128 the scales weigh half as much.",
        "",
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
    ]
    for row in rows:
        low, high = row.total.interval
        cells = [
            f"`{row.kv_cache_dtype}`",
            f"{row.token_bytes}",
            f"{row.token_bytes / rows[0].token_bytes:.1%}",
            *(f"{100 * row.families[family].share:.1f}" for family in FAMILIES),
            f"**{100 * row.total.share:.1f}**",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{row.same / row.total.asked:.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def document(rows: Sequence[Row], conditions: str) -> dict[str, Any]:
    """The results as a JSON document."""
    return {"conditions": conditions, "rows": [asdict(row) for row in rows]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-family", type=int, default=60, help="questions of each of the ten families")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for row in measure(options.per_family):
        rows.append(row)
        print(f"{row.kv_cache_dtype}: {row.total.right} of {row.total.asked} in {row.seconds:.0f} s", flush=True)
    conditions = (
        f"{rows[0].total.asked} held-out questions, {options.per_family} of each family, the bundled model in float32 on "
        f"a CPU, torch {torch.__version__}, no compression, greedy."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kv_dtype.md").write_text(markdown(rows, conditions), encoding="utf-8")
    (options.out / "kv_dtype.json").write_text(
        json.dumps(document(rows, conditions), indent=1) + "\n", encoding="utf-8"
    )
    print(markdown(rows, conditions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
