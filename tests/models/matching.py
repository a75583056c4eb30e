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
from transformers.image_processing_utils import BatchFeature
from transformers.video_utils import VideoMetadata

from prismserve.compression.loader import normalise, visual_method
from prismserve.core.prompt import image_key
from prismserve.core.types import (
    CompressionPlan,
    FrameTimes,
    MediaInput,
    MediaKind,
    MediaSegment,
    Prompt,
    Request,
    SamplingParams,
    TextSegment,
)
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.models.loader import load_model
from prismserve.models.processing import ChatMessage, ImageSlot, Processor, VideoSlot
from tests.models.vocabulary import chat_template
from tests.models.zoo import Specimen

NAMESPACE = b"n" * 32
OFF = CompressionPlan(visual=normalise(visual_method("none"), {}, "visual"))


def picture(seed: int, width_px: int, height_px: int) -> Image.Image:
    """Coarse noise, so that resizing keeps something of it."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width_px, height_px), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Clip:
    """A video: its frames, uint8 [frames, height, width, 3], and where in the original they stood."""

    frames: np.ndarray[Any, Any]
    indices: tuple[int, ...]
    total: int
    fps: float

    @property
    def times(self) -> FrameTimes:
        return FrameTimes(tuple(at / self.fps for at in self.indices), len(self.indices) / self.total * self.fps)


def clip(seed: int, width_px: int, height_px: int, indices: tuple[int, ...], fps: float = 12.5) -> Clip:
    """Frames of coarse noise out of a video of 50."""
    frames = [np.asarray(picture(seed * 100 + at, width_px, height_px)) for at in indices]
    return Clip(np.stack(frames), indices, 50, fps)


@dataclass(frozen=True)
class Case:
    """One user turn: images, videos, then the question."""

    question: str
    images: tuple[Image.Image, ...] = ()
    videos: tuple[Clip, ...] = ()


CASES = {
    "no image": Case("What is the color of the sky?"),
    "one image": Case("What is in the picture?", (picture(1, 70, 40),)),
    "several images": Case("Which is red?", (picture(2, 40, 90), picture(1, 70, 40), picture(3, 33, 33))),
}

VIDEO_CASES = {
    # An odd number of frames; and times that reach beyond the positions of the text behind.
    "one video": Case("What moves?", videos=(clip(4, 70, 40, (0, 9, 21, 30, 44)),)),
    "slow video": Case("?", videos=(clip(5, 33, 50, (0, 30), fps=0.2),)),
    "video and images": Case(
        "Which is it?",
        (picture(1, 70, 40), picture(2, 40, 90)),
        (clip(6, 40, 40, (3, 7, 20)), clip(7, 40, 40, (1, 2, 49), fps=24.0)),
    ),
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
        images = len(case.images)
        slots = [ImageSlot(i) if i < images else VideoSlot(i) for i in range(images + len(case.videos))]
        media = (*(_media(image) for image in case.images), *(_video(video) for video in case.videos))
        segments: list[TextSegment | MediaSegment] = []
        run: list[int] = []
        times = {images + i: video.times for i, video in enumerate(case.videos)}
        for item in self.processor.render_chat([ChatMessage("user", (*slots, case.question))], times):
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
        entry, images = media[index], sum(item.kind is MediaKind.IMAGE for item in media)
        if entry.times is None:
            layout = self.processor.image_layout(entry.width_px, entry.height_px, images=images)
            fingerprint = self.processor.image_fingerprint(images)
        else:
            layout = self.processor.video_layout(entry.width_px, entry.height_px, entry.times)
            fingerprint = self.processor.video_fingerprint
        method = visual_method(visual.visual.name)
        values = {key: value for key, value in visual.visual.params if key != "version"}
        kept = layout.kept(method.kept_tokens(method.Config(**values), layout.raster_tokens))
        key = image_key(entry.pixel_hash, fingerprint, self.model.encoder_fingerprint, visual.visual.fingerprint())
        return MediaSegment(index, key, kept, layout.tokens, layout.position_span, layout.position_reach)

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


def _video(video: Clip) -> MediaInput:
    data = video.frames.tobytes()
    pixel_hash = hashlib.sha256(str(video.frames.shape).encode() + video.times.packed() + data).digest()
    return MediaInput(data, pixel_hash, video.frames.shape[2], video.frames.shape[1], video.times)


class VideoPixels:
    """In place of transformers' video processors, which need torchvision: the pixels that we give our encoder.

    What a processor does with them, text and times included, is transformers' own.
    """

    num_frames = None
    fps = None

    def __init__(self, processor: Processor, images: Any, name: str) -> None:
        """Give pixels as ``processor`` does, under ``name``; patches are those of the image processor."""
        self._recipe = processor._video_recipe
        self._name = name
        self.merge_size = getattr(images, "merge_size", None)
        self.temporal_patch_size = getattr(images, "temporal_patch_size", None)
        self.model_input_names = [name]

    def __call__(self, videos: Sequence[np.ndarray[Any, Any]], **options: Any) -> BatchFeature:
        tensors = [self._recipe.tensors(np.asarray(video)) for video in videos]
        names = {"pixel_values": self._name}
        together = torch.stack if "pixel_values" in tensors[0] else torch.cat
        data = {names.get(name, name): together([item[name] for item in tensors]) for name in tensors[0]}
        if self._name == "pixel_values":
            # One sample of several frames each: [videos, frames, ...], as the model takes images.
            data = {name: tensor.flatten(0, 1) for name, tensor in data.items()}
        return BatchFeature({**data, "video_metadata": options["video_metadata"]})


class Theirs:
    """The same checkpoint in transformers."""

    def __init__(self, specimen: Specimen, model: Any, processor: Processor) -> None:
        """Answer with ``model``; only the pixels of videos are from ``processor``."""
        self.model = model
        self.processor = specimen.processor()
        self.sees = specimen.sees
        self.shared_name = specimen.video_pixels == "pixel_values"
        self.cases = {name: case for name, case in CASES.items() if specimen.sees or not case.images}
        if specimen.sees:
            self.processor.chat_template = chat_template(specimen.placeholder, specimen.video)
        if specimen.video:
            pixels = VideoPixels(processor, self.processor.image_processor, specimen.video_pixels)
            self.processor.video_processor = pixels
            self.cases |= VIDEO_CASES

    def inputs(self, case: Case) -> dict[str, Any]:
        """What the model takes: transformers' own reading of the rendered chat."""
        if not self.sees:
            text = f"<|im_start|>user\n{case.question}<|im_end|>\n<|im_start|>assistant"
            return dict(self.processor.tokenizer(text, return_tensors="pt"))
        media = [{"type": "image"}] * len(case.images) + [{"type": "video"}] * len(case.videos)
        turn = {"role": "user", "content": [*media, {"type": "text", "text": case.question}]}
        text = self.processor.apply_chat_template([turn], add_generation_prompt=True)
        videos: dict[str, Any] = {}
        if case.videos:
            metadata = [
                VideoMetadata(
                    total_num_frames=item.total,
                    fps=item.fps,
                    duration=item.total / item.fps,
                    frames_indices=list(item.indices),
                )
                for item in case.videos
            ]
            videos = {"videos": [item.frames for item in case.videos], "video_metadata": metadata}
        images = [list(case.images)] if case.images else None
        inputs = dict(self.processor(images=images, text=[text], return_tensors="pt", **videos))
        inputs.pop("video_metadata", None)
        if images and videos and self.shared_name:
            # The processor keeps one of two things of the same name; the model takes both, in their order.
            stills = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"][0]
            inputs["pixel_values"] = torch.cat((stills, inputs["pixel_values"].flatten(0, 1)))[None]
            del inputs["pixel_attention_mask"]
        return inputs

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
