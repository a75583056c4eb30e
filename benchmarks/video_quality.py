"""Exact match on held-out clips by token budget and question family, for every method that acts on videos.

    python -m benchmarks.video_quality [--per-family N] [--methods a,b] [--keeps 98,49,24] [--weights FILE] [--resume] [--out FOLDER]

The model is the reference model trained for clips (``prismserve.models.reference.train_clips``), served as the
LLaVA-OneVision checkpoint it is: frames, tokens of each frame, visual method, engine. Clips are encoded once; everything
behind the encoder is what a worker does. ``off`` is always measured, and alone with ``--methods off``. ``random``,
``uniform`` and ``pool`` are controls, ``oracle`` is the clip's own labels: tokens that show a shape first. Methods that
act inside the decoder appear as ``prefill/<name>``. Families that the model does not answer without compression are left
out and listed. Writes ``video_quality.md`` and ``.json`` after every row; ``--resume`` measures only the rows that are
not there yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.asking import add_budgets, answered, budgets_of, request_about, scored
from benchmarks.demo_accuracy import Question
from benchmarks.quality import ORACLE, cells, plan_of
from benchmarks.quality import methods as image_methods
from benchmarks.quality_report import INSIDE
from benchmarks.video import methods as frame_methods
from benchmarks.video_quality_report import Basis, Family, VideoRow, families_of, one_line, rows_of, write
from prismserve.compression import loader
from prismserve.compression.base import Share
from prismserve.core.hashing import digest, pack_ids
from prismserve.core.types import (
    CompressionPlan,
    FrameTimes,
    MediaInput,
    MediaSegment,
    MethodSpec,
    Request,
)
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.engine.image_cache import ImageCache, VisualTokens
from prismserve.engine.vision import VisionPipeline
from prismserve.models.loader import load_model
from prismserve.models.processing import ChatMessage, Processor, VideoSlot
from prismserve.models.reference.clip_model import write_checkpoint
from prismserve.models.reference.clip_questions import CLIP_FAMILIES
from prismserve.models.reference.clips import FRAMES, HELD_OUT_SEED, TOKENS, Clip

if TYPE_CHECKING:
    from prismserve.models.base import EncodedImage, ImageInputs, VisionLanguageModel

KEEPS: Final = (98, 49, 24)
WEIGHTS: Final = Path(__file__).parent / "clip_weights" / "decoder.safetensors"
LEAST: Final = 0.6
"""Share right without compression from which on a family says something about methods."""
BUDGETS: Final[dict[str, Callable[[float], dict[str, float]]]] = {
    "prefill/framefusion": lambda share: {"cost": share},
    "prefill/sttm": lambda threshold: {"spatial": threshold, "temporal": threshold - 0.3},
}
"""Parameters of methods without ``keep``: by the share of the tokens that is asked for, or by a threshold."""
THRESHOLDS: Final = {"prefill/sttm": (0.0, 1.1)}
"""Methods that leave what a threshold leaves: it is sought so that a few clips before the first keep the budget on average."""
_CALIBRATION_CLIPS: Final = 12
_CALIBRATION_ROUNDS: Final = 7
_TIMES: Final = FrameTimes((0.0, 0.5, 1.0, 1.5), 2.0)
_ANSWER_TOKENS_MAX: Final = 12
_NEUTRAL: Final = "How many objects are shown?"
_SLOTS: Final = TOKENS + 1


@dataclass(frozen=True, slots=True)
class Shown:
    """One clip, encoded once.

    Attributes:
        media: the frames as a request carries them.
        inputs: what the processor makes of them.
        foreground: [196] bool, tokens that show a shape, by the clip's own labels.
    """

    media: MediaInput
    inputs: ImageInputs
    foreground: torch.Tensor


class EncodedOnce:
    """A model whose encoder has already seen every clip; all else is the model's own."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self._encoded: dict[int, EncodedImage] = {}

    def see(self, inputs: ImageInputs) -> None:
        """Encode a clip; ``inputs`` must stay alive."""
        (self._encoded[id(inputs)],) = self._model.encode_images([inputs], frozenset())

    def encode_images(self, images: Sequence[ImageInputs], needs: frozenset[str]) -> list[EncodedImage]:
        """What the encoder gave; the methods measured here need nothing else of it."""
        if needs:
            message = f"clips were encoded without {', '.join(sorted(needs))}"
            raise ValueError(message)
        return [self._encoded[id(inputs)] for inputs in images]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Bench:
    """The model, the clips, and the questions about them."""

    def __init__(self, directory: Path, questions: Sequence[Question]) -> None:
        self.questions = list(questions)
        self.processor = Processor.from_directory(directory)
        self.model = load_model(directory, dtype="float32", device="cpu", progress=None)
        self.seen = EncodedOnce(self.model)
        self.clips: dict[int, Shown] = {}
        spent = []
        for seed in dict.fromkeys(question.seed for question in questions):
            began = time.thread_time()
            self.clips[seed] = self._shown(seed)
            spent.append(1000 * (time.thread_time() - began))
        self.encode_ms = statistics.median(spent)

    def _shown(self, seed: int) -> Shown:
        clip = Clip(seed)
        data = clip.frames.tobytes()
        height, width = clip.frames.shape[1:3]
        pixel_hash = hashlib.sha256(data + _TIMES.packed()).digest()
        shown = Shown(
            MediaInput(data, pixel_hash, width, height, _TIMES),
            self.processor.preprocess_video(clip.frames, _TIMES),
            torch.from_numpy(clip.foreground()),
        )
        self.seen.see(shown.inputs)
        return shown

    def engine(self) -> Engine:
        """An engine with empty caches and room for every question of some clips."""
        config = EngineConfig(
            kv_cache_bytes=256 << 20,
            image_cache_bytes=1 << 30,
            max_waiting=1 << 16,
            max_model_len=512,
            max_encode_images=1,
        )
        return Engine(self.model, self.processor, config)

    # ---- one clip under one method ---------------------------------------------------------------------------

    def reduced(
        self, cache: ImageCache, key: bytes, shown: Shown, spec: MethodSpec | None, keep: int, text: str
    ) -> float:
        """Put a clip's decoder inputs into ``cache`` under a visual method (None: by its labels); milliseconds."""
        if spec is None:
            noise = torch.rand(TOKENS, generator=torch.Generator().manual_seed(shown.media.pixel_hash[0]))
            best = (noise + 2 * shown.foreground.float()).argsort(descending=True)[:keep]
            # What stands behind the last frame is kept, as with any method.
            places = torch.cat([best, torch.arange(TOKENS, _SLOTS)]).sort().values
            tokens = self.seen.encode_images([shown.inputs], frozenset())[0].tokens
            cache.put(key, VisualTokens(self.model.project(tokens[places]), places, _SLOTS))
            return 0.0
        pipeline = VisionPipeline(self.seen, self.processor, cache)
        began = time.thread_time()
        pipeline.encode([key], [shown.media], [shown.inputs], spec, [self.scoring_ids(text)])
        return 1000 * (time.thread_time() - began)

    def scoring_ids(self, text: str) -> tuple[int, ...]:
        """What a method that asks about the question ranks by."""
        return self.processor.scoring_ids([ChatMessage("user", (VideoSlot(0), text))])

    def request(self, name: str, question: Question, key: bytes, plan: CompressionPlan, kept: int) -> Request:
        """One question about one clip."""
        rendered = self.processor.render_chat([ChatMessage("user", (VideoSlot(0), question.text))], {0: _TIMES})
        return request_about(
            name,
            rendered,
            (self.clips[question.seed].media, MediaSegment(0, key, kept, _SLOTS)),
            plan,
            self.scoring_ids(question.text),
            namespace="video-quality",
            max_tokens=_ANSWER_TOKENS_MAX,
        )

    # ---- one method at one budget ----------------------------------------------------------------------------

    def measure(self, method: str, keep: int) -> VideoRow:
        """Ask every question."""
        threshold = self.threshold(method, keep) if method in THRESHOLDS else None
        return self._measure(method, keep, threshold)

    def threshold(self, method: str, keep: int) -> float:
        """By bisection on clips that no question of a table is about."""
        low, high = THRESHOLDS[method]
        asked, self.questions = self.questions, [Question(seed, "count", _NEUTRAL, "") for seed in self._calibration()]
        for _ in range(_CALIBRATION_ROUNDS):
            middle = (low + high) / 2
            few = self._measure(method, keep, middle).tokens < keep
            low, high = (middle, high) if few else (low, middle)
        self.questions = asked
        return (low + high) / 2

    def _calibration(self) -> range:
        seeds = range(HELD_OUT_SEED - _CALIBRATION_CLIPS, HELD_OUT_SEED)
        for seed in seeds:
            if seed not in self.clips:
                self.clips[seed] = self._shown(seed)
        return seeds

    def _measure(self, method: str, keep: int, threshold: float | None) -> VideoRow:
        spec, plan, share = video_plan(method, keep, threshold)
        asks = share == Share.QUERY and not method.startswith(INSIDE)
        engine = self.engine()
        costs: list[float] = []
        kept: list[int] = []
        waves: tuple[list[Request], list[Request]] = ([], [])
        met: set[int] = set()
        for index, question in enumerate(self.questions):
            shown = self.clips[question.seed]
            about = pack_ids(self.scoring_ids(question.text)) if asks else b""
            key = digest("video-quality", shown.media.pixel_hash, method.encode(), about)
            if key not in engine.image_cache:
                costs.append(self.reduced(engine.image_cache, key, shown, spec, keep, question.text))
            visual = engine.image_cache.get(key)
            if visual is None:
                message = "the image cache is too small for the questions of one row"
                raise RuntimeError(message)
            kept.append(visual.embeds.shape[0])
            # The first question about a clip leaves its prefix to the others.
            waves[question.seed in met and not asks].append(self.request(str(index), question, key, plan, kept[-1]))
            met.add(question.seed)
        answers: dict[str, list[int]] = {}
        left: dict[str, int] = {}
        for wave in waves:
            answers.update(answered(engine, wave, left))
        families = scored(self.processor, self.questions, answers, CLIP_FAMILIES)
        inside = method.startswith(INSIDE)
        # The token behind the last frame is no token of a frame.
        tokens = statistics.fmean(left.values()) if inside else statistics.fmean(kept) - (_SLOTS - TOKENS)
        return VideoRow(method, keep, share, families, tokens, 0.0 if inside else statistics.median(costs))


def video_plan(
    method: str, keep: int, threshold: float | None = None
) -> tuple[MethodSpec | None, CompressionPlan, str]:
    """As :func:`benchmarks.quality.plan_of`, also for methods that have a threshold or a cost in place of a budget."""
    if method not in BUDGETS:
        return plan_of(method, keep)
    inside = loader.prefill_method(method.removeprefix(INSIDE))
    parameters = BUDGETS[method](keep / TOKENS if threshold is None else threshold)
    prefill = loader.normalise(inside, parameters, "compression.prefill")
    none = loader.normalise(loader.visual_method("none"), {}, "compression.visual")
    return none, CompressionPlan(visual=none, prefill=prefill), str(inside.share)


def draw_questions(per_family: int, first_seed: int) -> list[Question]:
    """The first ``per_family`` questions of every family, clip by clip."""
    drawn: list[Question] = []
    counts = dict.fromkeys(CLIP_FAMILIES, 0)
    seed = first_seed
    while min(counts.values()) < per_family:
        for family, text, answer in Clip(seed).questions():
            if counts[family] < per_family:
                counts[family] += 1
                drawn.append(Question(seed, family, text, answer))
        seed += 1
    return drawn


def methods() -> tuple[str, ...]:
    """Every method that can act on the frames of a video, controls first, the oracle after them."""
    frames = frame_methods()
    controls = [name for name in frames if name in {"random", "uniform", "pool"}]
    inside = [name for name in image_methods() if name.startswith(INSIDE)]
    return (*controls, ORACLE, *(name for name in frames if name not in controls), *inside, *BUDGETS)


def dear_last(chosen: Sequence[str], keeps: Sequence[int]) -> list[tuple[str, int]]:
    """(method, keep) of every row; those that compute something for every question come last, for runs that are cut off."""
    pairs = [(method, keep) for method, keep in cells(chosen, keeps) if method != "off"]
    return sorted(pairs, key=lambda pair: video_plan(*pair)[2] == Share.QUERY or pair[0].startswith(INSIDE))


def judged(questions: Sequence[Question], off: VideoRow, least: float) -> list[Family]:
    """What is known of each family before any compression: its score, the best guess, whether it is measured on.

    A family is measured on where ``least`` of it is right and that is more than guessing gives; with ``least`` 0 always.
    """
    out = []
    for name, score in off.families.items():
        answers = Counter(question.answer for question in questions if question.family == name)
        guess = answers.most_common(1)[0][1] / answers.total()
        answered_well = score.share >= least and score.interval[0] > guess
        out.append(Family(name, score, guess, used=answered_well or least == 0))
    return out


def measured(
    bench: Bench,
    pairs: Sequence[tuple[str, int]],
    before: Sequence[VideoRow],
    families: Sequence[Family],
    basis: Basis,
    folder: Path,
) -> Iterator[VideoRow]:
    """Measure the rows that are not among those ``before``, and write them all after every one: a run may be cut off."""
    used = [family.name for family in families if family.used]
    bench.questions = [question for question in bench.questions if question.family in used]
    conditions = (
        f"Reference model trained for clips, in float32 on one CPU thread, greedy: {FRAMES} frames of 7 x 7 tokens. "
        f"{basis.per_family} questions a family about {len(bench.clips)} clips from seed {basis.seed}."
    )
    rows = list(before) if used else []
    write(rows, families, conditions, basis, folder)
    there = {(row.method, row.keep) for row in rows}
    for method, keep in pairs if used else ():
        if (method, keep) not in there:
            rows.append(bench.measure(method, keep))
            write(rows, families, conditions, basis, folder)
            yield rows[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.video_quality``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.video_quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--per-family", type=int, default=200, help="questions of each family (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="first clip (default: %(default)s)")
    add_budgets(parser, KEEPS)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="decoder.safetensors (default: %(default)s)")
    parser.add_argument(
        "--least", type=float, default=LEAST, help="share right a family needs without compression; 0 for all"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that OUT/video_quality.json has of the same questions"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    arguments = parser.parse_args(argv)
    chosen, keeps = budgets_of(parser, arguments, ("off", *methods()), TOKENS)
    if not arguments.weights.is_file():
        parser.error(f"--weights: {arguments.weights} does not exist")
    digest_of_weights = hashlib.sha256(arguments.weights.read_bytes()).hexdigest()
    basis = Basis(arguments.per_family, arguments.seed, arguments.least, digest_of_weights)
    before = arguments.out / "video_quality.json"
    rows: list[VideoRow] = []
    families: list[Family] = []
    if arguments.resume and before.is_file():
        known = json.loads(before.read_text(encoding="utf-8"))
        if known.get("basis") != asdict(basis):
            parser.error(f"--resume: {before} is about other questions or weights")
        rows, families = rows_of(known), families_of(known)
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        directory = write_checkpoint(Path(folder), arguments.weights)
        bench = Bench(directory, draw_questions(basis.per_family, basis.seed))
        if not families:
            off = bench.measure("off", TOKENS)
            families = judged(bench.questions, off, basis.least)
            rows = [off.only([family.name for family in families if family.used])]
            print(f"{time.monotonic() - began:6.0f} s  {TOKENS:3d}  {'off':24} {one_line(off)}", flush=True)
        for row in measured(bench, dear_last(chosen, keeps), rows, families, basis, arguments.out):
            print(f"{time.monotonic() - began:6.0f} s  {row.keep:3d}  {row.method:24} {one_line(row)}", flush=True)
    print(f"written to {arguments.out} after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
