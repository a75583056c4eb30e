"""The same conversation through the engine and through transformers: tokens and logits of both."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

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
from prismserve.models.loader import load_model
from prismserve.models.processing import ChatMessage, ImageSlot, Processor
from tests.models.zoo import Specimen

NAMESPACE = b"n" * 32
OFF = CompressionPlan(visual=normalise(visual_method("none"), {}, "visual"))


def picture(seed: int, width_px: int, height_px: int) -> Image.Image:
    """Coarse noise, so that resizing keeps something of it."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width_px, height_px), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Case:
    """One user turn."""

    question: str
    images: tuple[Image.Image, ...] = ()


CASES = {
    "no image": Case("What is the color of the sky?"),
    "one image": Case("What is in the picture?", (picture(1, 70, 40),)),
    "several images": Case("Which is red?", (picture(2, 40, 90), picture(1, 70, 40), picture(3, 33, 33))),
}


@dataclass
class Ours:
    """A loaded checkpoint, and engines that remember the logits they sampled from."""

    directory: Path
    dtype: str = "float32"
    logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.processor = Processor.from_directory(self.directory)
        self.model = load_model(self.directory, dtype=self.dtype)

    def request(self, name: str, case: Case, tokens: int, visual: CompressionPlan = OFF) -> Request:
        parts = (*(ImageSlot(index) for index in range(len(case.images))), case.question)
        media = tuple(_media(image) for image in case.images)
        segments: list[TextSegment | MediaSegment] = []
        run: list[int] = []
        for item in self.processor.render_chat([ChatMessage("user", parts)]):
            if isinstance(item, int):
                run.append(item)
                continue
            segments.append(TextSegment(tuple(run)))
            run = []
            segments.append(self._segment(item.index, media, visual))
        segments.append(TextSegment(tuple(run)))
        sampling = SamplingParams(max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        prompt = Prompt(tuple(segment for segment in segments if segment.tokens))
        return Request(name, 0, NAMESPACE, NAMESPACE, prompt, media, sampling, visual)

    def _segment(self, index: int, media: tuple[MediaInput, ...], visual: CompressionPlan) -> MediaSegment:
        entry, images = media[index], len(media)
        layout = self.processor.image_layout(entry.width_px, entry.height_px, images=images)
        method = visual_method(visual.visual.name)
        values = {key: value for key, value in visual.visual.params if key != "version"}
        kept = method.kept_tokens(method.Config(**values), layout.tokens)
        fingerprint = self.processor.image_fingerprint(images)
        key = image_key(entry.pixel_hash, fingerprint, self.model.encoder_fingerprint, visual.visual.fingerprint())
        return MediaSegment(index, key, kept, layout.tokens, layout.position_span)

    def run(self, requests: Sequence[Request], **config: Any) -> dict[str, list[int]]:
        """Greedy tokens of each request, all submitted at once; logits of every step into ``logits``."""
        settings = EngineConfig(**{"kv_cache_bytes": 32 << 20, "max_model_len": 1024, **config})
        engine = Engine(self.model, self.processor, settings)
        runner = engine._stepper._runner
        plain = runner.run

        def recording(items: Any, layer_done: Any) -> torch.Tensor:
            logits = plain(items, layer_done)
            sampling = [item.sequence.request.request_id for item in items if item.samples]
            for name, row in zip(sampling, logits, strict=True):
                self.logits.setdefault(name, []).append(row.clone())
            return logits

        runner.run = recording
        for request in requests:
            engine.submit(request, worker="local")
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        while engine.has_work:
            for output in engine.step():
                assert not output.error, output.error
                tokens[output.request_id].extend(output.token_ids)
            engine.check_integrity()
        return tokens


def _media(image: Image.Image) -> MediaInput:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixel_hash = hashlib.sha256(str(image.size).encode() + image.tobytes()).digest()
    return MediaInput(buffer.getvalue(), pixel_hash, *image.size)


class Theirs:
    """The same checkpoint in transformers."""

    def __init__(self, specimen: Specimen, model: Any) -> None:
        """Answer with ``model``."""
        self.model = model
        self.processor = specimen.processor()
        self.placeholder = specimen.placeholder
        self.sees = specimen.sees
        self.cases = {name: case for name, case in CASES.items() if specimen.sees or not case.images}

    def inputs(self, case: Case) -> dict[str, Any]:
        """What the model takes: transformers' own reading of the rendered chat."""
        images = self.placeholder * len(case.images)
        text = f"<|im_start|>user\n{images}{case.question}<|im_end|>\n<|im_start|>assistant"
        if not self.sees:
            return dict(self.processor.tokenizer(text, return_tensors="pt"))
        return dict(
            self.processor(images=[list(case.images)] if case.images else None, text=[text], return_tensors="pt")
        )

    def generate(self, case: Case, tokens: int) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and the logits [tokens, vocabulary] they were taken from."""
        inputs = self.inputs(case)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=tokens,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits)
