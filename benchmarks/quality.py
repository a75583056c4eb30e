"""Exact match of the reference model by visual-token budget, for every method that reduces visual tokens.

    python -m benchmarks.quality [--per-family N] [--seed S] [--methods a,b] [--keeps 98,49,24,12] [--out FOLDER] [--update]

Runs the engine in this process: one encoding per picture serves every method, budget and question. ``random``,
``uniform``, ``pool`` and ``cls_topk`` are controls; ``oracle`` is no method but the scene's own labels, patches that show
something first. Methods that act inside the decoder appear as ``prefill/<name>``. Writes ``quality.md``, ``.json`` and
``.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from benchmarks.asking import add_budgets, answered, budgets_of, request_about, scored
from benchmarks.demo_accuracy import SEED_FIRST, VISUAL_TOKENS, Question, draw_questions
from benchmarks.quality_report import INSIDE, Row, one_line, rows_of, updated, write
from prismserve.compression import loader
from prismserve.compression.apply import apply_visual
from prismserve.compression.base import Need, Share, VisualFeatures
from prismserve.core.hashing import digest, pack_ids
from prismserve.core.types import (
    CompressionPlan,
    MediaInput,
    MediaSegment,
    MethodSpec,
    Request,
)
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.engine.image_cache import VisualTokens
from prismserve.models.base import ImageInputs
from prismserve.models.loader import load_model
from prismserve.models.processing import ChatMessage, ImageSlot, Processor
from prismserve.models.reference import reference_path
from prismserve.models.reference.scenes import FAMILIES, Scene

KEEPS: Final = (98, 49, 24, 12)
ORACLE: Final = "oracle"
_ANSWER_TOKENS_MAX: Final = 48
_TTFT_PICTURES: Final = 9
_ENCODED: Final = 3
_ENCODINGS: Final = 20
_NEEDS: Final = frozenset({"cls_attention", "encoder_keys"})


@dataclass(frozen=True, slots=True)
class Picture:
    """One scene, encoded once.

    Attributes:
        media: the picture as a request carries it.
        features: what any method may see of it, without the question.
        foreground: [N] bool, patches that show a shape or glyph, by the scene's own labels.
    """

    media: MediaInput
    features: VisualFeatures
    foreground: torch.Tensor


class Bench:
    """The model, the pictures, and what it costs to look at one."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self.processor = Processor.from_directory(reference_path())
        self.model = load_model(reference_path(), dtype="float32", device="cpu", progress=None)
        self.pictures = {seed: self._picture(seed) for seed in dict.fromkeys(q.seed for q in questions)}
        self.encode_ms, self.taps_ms = self._encoder_ms()

    def engine(self) -> Engine:
        """An engine with empty caches and room for every question of some scenes."""
        config = EngineConfig(kv_cache_bytes=256 << 20, max_waiting=1 << 16, max_model_len=512, max_encode_images=1)
        return Engine(self.model, self.processor, config)

    def _picture(self, seed: int) -> Picture:
        scene = Scene(seed)
        stream = io.BytesIO()
        scene.image.save(stream, "PNG")
        pixel_hash = hashlib.sha256(scene.image.tobytes()).digest()
        media = MediaInput(stream.getvalue(), pixel_hash, *scene.image.size)
        encoded = self.model.encode_images([self.processor.preprocess(scene.image)], _NEEDS)[0]
        features = VisualFeatures(
            tokens=encoded.tokens,
            grid=encoded.grid,
            seed=pixel_hash[:8],
            cls_attention=encoded.cls_attention,
            keys=encoded.keys,
            projected=self.model.project(encoded.tokens),
        )
        labels = scene.labels()
        shown = (labels["shape"] > 0) | (labels["char"] > 0)
        return Picture(media, features, torch.from_numpy(np.asarray(shown)))

    def _encoder_ms(self) -> tuple[float, dict[str, float]]:
        """Median time of encoding one picture, and what it takes longer for each thing methods ask the encoder for.

        The difference is small beside the whole, so it is the median of differences of runs that follow each other.
        """
        images = [Scene(question.seed).image for question in self.questions[:_ENCODED]]
        plain: list[float] = []
        longer: dict[str, list[float]] = {need: [] for need in sorted(_NEEDS)}
        for one in [self.processor.preprocess(image) for image in images] * _ENCODINGS:
            plain.append(self._encode_ms(one, frozenset()))
            for need, times in longer.items():
                times.append(self._encode_ms(one, frozenset({need})) - plain[-1])
        return statistics.median(plain), {need: max(0.0, statistics.median(times)) for need, times in longer.items()}

    def _encode_ms(self, image: ImageInputs, needs: frozenset[str]) -> float:
        began = time.thread_time()
        self.model.encode_images([image], needs)
        return 1000 * (time.thread_time() - began)

    # ---- one picture under one method ------------------------------------------------------------------------

    def reduced(self, picture: Picture, spec: MethodSpec | None, keep: int, text: str) -> tuple[VisualTokens, float]:
        """A picture's embeddings under a visual method (None: by its labels), and the milliseconds it took."""
        if spec is None:
            noise = torch.rand(VISUAL_TOKENS, generator=torch.Generator().manual_seed(picture.features.seed[0]))
            indices = (noise + 2 * picture.foreground.float()).argsort(descending=True)[:keep].sort().values
            return self._visual(picture.features.tokens[indices], indices), 0.0
        needs = loader.visual_method(spec.name).needs
        features = picture.features
        if Need.PROJECTED in needs:
            # Not timed: every token is projected once, as it is without any method.
            features = dataclasses.replace(features, projected=self.model.project(features.tokens))
        began = time.thread_time()
        if Need.TEXT_EMBEDDINGS in needs:
            ids = torch.tensor(self.scoring_ids(text))
            features = dataclasses.replace(features, text=self.model.decoder.embed(ids))
        tokens, indices = apply_visual(features, spec)
        spent = 1000 * (time.thread_time() - began)
        return self._visual(tokens, indices), spent + sum(self.taps_ms.get(str(need), 0.0) for need in needs)

    def _visual(self, tokens: torch.Tensor, indices: torch.Tensor) -> VisualTokens:
        return VisualTokens(self.model.project(tokens), indices, VISUAL_TOKENS)

    def scoring_ids(self, text: str) -> tuple[int, ...]:
        """What a method that asks about the question ranks by."""
        return self.processor.scoring_ids([ChatMessage("user", (ImageSlot(0), text))])

    def request(self, name: str, question: Question, key: bytes, plan: CompressionPlan, kept: int) -> Request:
        """One question about one picture."""
        rendered = self.processor.render_chat([ChatMessage("user", (ImageSlot(0), question.text))])
        return request_about(
            name,
            rendered,
            (self.pictures[question.seed].media, MediaSegment(0, key, kept, VISUAL_TOKENS)),
            plan,
            self.scoring_ids(question.text),
            namespace="quality",
            max_tokens=_ANSWER_TOKENS_MAX,
        )

    # ---- one method at one budget ----------------------------------------------------------------------------

    def measure(self, method: str, keep: int) -> Row:
        """Ask every question."""
        spec, plan, share = plan_of(method, keep)
        kept = VISUAL_TOKENS if method.startswith(INSIDE) else keep
        row = Row(method, keep, share)
        asks = share == Share.QUERY and not method.startswith(INSIDE)
        engine, costs, seen = self.engine(), [], set()
        first: list[Request] = []
        others: list[Request] = []
        for index, question in enumerate(self.questions):
            picture = self.pictures[question.seed]
            about = pack_ids(self.scoring_ids(question.text)) if asks else b""
            key = digest("quality-image", picture.media.pixel_hash, method.encode(), about)
            if key not in engine.image_cache:
                visual, spent = self.reduced(picture, spec, kept, question.text)
                engine.image_cache.put(key, visual)
                costs.append(spent)
            wave = others if question.seed in seen and not asks else first
            seen.add(question.seed)
            wave.append(self.request(str(index), question, key, plan, kept))
        answers: dict[str, list[int]] = {}
        # The first question about a picture leaves its prefix to the others.
        for wave in (first, others):
            answers.update(answered(engine, wave))
        row.families = scored(self.processor, self.questions, answers, FAMILIES)
        row.cost_ms = 0.0 if method.startswith(INSIDE) else statistics.median(costs)
        row.kv_bytes = statistics.fmean(self._kv_bytes(engine, plan, one) for one in (*first, *others))
        row.ttft_ms = self._ttft_ms(method, spec, plan, kept)
        row.encode_ms = self.encode_ms
        return row

    def _kv_bytes(self, engine: Engine, plan: CompressionPlan, request: Request) -> float:
        layout, text = engine.layout, request.prompt.tokens - request.prompt.visual_tokens
        visual = request.prompt.visual_tokens
        if plan.prefill.name == "none":
            return float((text + visual) * layout.token_bytes)
        method, config = loader.prefill_method(plan.prefill.name), loader.config_of(plan.prefill, "prefill")
        cuts = [cut.layer for cut in method.cuts(config, layout.layers)]
        counts = method.kept_tokens(config, layout.layers, visual)
        held = [visual] * layout.layers
        for layer, count in zip(cuts, counts, strict=True):
            held[layer:] = [count] * (layout.layers - layer)
        return float(sum(text + tokens for tokens in held) * layout.token_layer_bytes)

    def _ttft_ms(self, method: str, spec: MethodSpec | None, plan: CompressionPlan, kept: int) -> float:
        """Median over pictures of encoding, choosing and computing the prompt, one picture at a time."""
        if method == ORACLE or spec is None:
            return float("nan")
        engine, times = self.engine(), []
        chosen = list({question.seed: question for question in self.questions}.values())[:_TTFT_PICTURES]
        for index, question in enumerate(chosen):
            key = digest("quality-ttft", self.pictures[question.seed].media.pixel_hash, method.encode())
            request = self.request(f"ttft-{index}", question, key, plan, kept)
            engine.submit(request, worker="local")
            began = time.thread_time()
            while not engine.step():
                pass
            times.append(1000 * (time.thread_time() - began))
            engine.cancel(request.request_id, 0)
        return statistics.median(times)


def plan_of(method: str, keep: int) -> tuple[MethodSpec | None, CompressionPlan, str]:
    """The visual spec (None: the oracle), the plan of a request, and the share code."""
    none = loader.normalise(loader.visual_method("none"), {}, "compression.visual")
    if method in {"off", ORACLE}:
        spec = none if method == "off" else None
        return spec, CompressionPlan(visual=none), str(Share.AGNOSTIC) if method == "off" else "labels"
    if method.startswith(INSIDE):
        inside = loader.prefill_method(method.removeprefix(INSIDE))
        prefill = loader.normalise(inside, {"keep": keep}, "compression.prefill")
        return none, CompressionPlan(visual=none, prefill=prefill), str(inside.share)
    chosen = loader.visual_method(method)
    spec = loader.normalise(chosen, {"keep": keep}, "compression.visual")
    return spec, CompressionPlan(visual=spec), str(chosen.share)


def methods() -> tuple[str, ...]:
    """Every method that reduces visual tokens, controls first."""
    visual = [name for name in loader.names("visual") if name != "none" and loader.visual_method(name).training_free]
    controls = [name for name in visual if loader.visual_method(name).section == "control"]
    inside = [
        INSIDE + name
        for name in loader.names("prefill")
        # Those without a budget of their own cannot be put beside the others.
        if "keep" in loader.prefill_method(name).Config.model_fields
    ]
    return (*controls, ORACLE, *(name for name in visual if name not in controls), *inside)


def cells(chosen: Sequence[str], keeps: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(method, keep) of every row, in the order of the table."""
    yield "off", VISUAL_TOKENS
    for keep in keeps:
        for method in chosen:
            yield method, keep


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.quality``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--per-family", type=int, default=100, help="questions of each family (default: 100)")
    parser.add_argument("--seed", type=int, default=SEED_FIRST, help=f"first scene (default: {SEED_FIRST})")
    add_budgets(parser, KEEPS)
    parser.add_argument(
        "--update", action="store_true", help="keep the rows of OUT/quality.json that are not measured now"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    arguments = parser.parse_args(argv)
    chosen, keeps = budgets_of(parser, arguments, methods(), VISUAL_TOKENS)
    before: list[Row] = []
    conditions = ""
    if arguments.update:
        known = json.loads((arguments.out / "quality.json").read_text(encoding="utf-8"))
        before, conditions = rows_of(known), known["conditions"]
        if {row.total.asked for row in before} != {arguments.per_family * len(FAMILIES)} or (
            f"from seed {arguments.seed}." not in conditions
        ):
            parser.error(f"--update: {arguments.out} holds rows of other questions")
    torch.set_num_threads(1)
    began = time.monotonic()
    with torch.inference_mode():
        bench = Bench(draw_questions(arguments.per_family, arguments.seed))
        rows = []
        for method, keep in cells(chosen, keeps):
            if method == "off" and before:
                continue
            row = bench.measure(method, keep)
            rows.append(row)
            print(f"{time.monotonic() - began:6.0f} s  {keep:3d}  {method:24} {one_line(row)}", flush=True)
    if before:
        conditions += f" Those of {', '.join(chosen)} were measured later, in a run of their own."
    else:
        conditions = (
            f"Reference model in float32 on one CPU thread, greedy, {len(bench.questions)} questions a row "
            f"({arguments.per_family} of each family) about {len(bench.pictures)} scenes from seed {arguments.seed}."
        )
    write(updated(before, rows), conditions, arguments.out)
    print(f"written to {arguments.out} after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
