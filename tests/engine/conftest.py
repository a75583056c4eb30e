"""A real model, real scenes, and what transformers answers."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from prismserve.compression.loader import kept_tokens, normalise, visual_method
from prismserve.core.prompt import image_key
from prismserve.core.types import (
    CompressionPlan,
    FinishReason,
    MediaInput,
    MediaSegment,
    Prompt,
    Request,
    SamplingParams,
    TextSegment,
    TokenOutput,
)
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.models.loader import load_model
from prismserve.models.processing import ChatMessage, ImageSlot, Processor
from prismserve.models.reference import reference_path
from prismserve.models.reference.scenes import HELD_OUT_SEED, make_scene
from tests.engine.small_text import TextWorkshop

NAMESPACE = b"n" * 32
OFF = CompressionPlan(visual=normalise(visual_method("none"), {}, "visual"))


class Workshop:
    """Builds requests and engines around the reference model, and drives them."""

    def __init__(self) -> None:
        self.processor = Processor.from_directory(reference_path())
        self.model = load_model(reference_path(), dtype="float32", device="cpu", progress=None)
        self._images: dict[int, Image.Image] = {}

    def scene(self, index: int) -> Image.Image:
        if index not in self._images:
            self._images[index] = make_scene(HELD_OUT_SEED + index)[0].convert("RGB")
        return self._images[index]

    def questions(self, index: int) -> list[str]:
        return [question for _, question, _ in make_scene(HELD_OUT_SEED + index)[1]]

    def media(self, image: Image.Image) -> MediaInput:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        pixel_hash = hashlib.sha256(str(image.size).encode() + image.tobytes()).digest()
        return MediaInput(buffer.getvalue(), pixel_hash, *image.size)

    def request(
        self,
        request_id: str,
        question: str,
        scenes: Sequence[int] = (),
        *,
        visual: CompressionPlan = OFF,
        history: Sequence[ChatMessage] = (),
        namespace: bytes = NAMESPACE,
        **sampling: Any,
    ) -> Request:
        parts = (*(ImageSlot(index) for index in range(len(scenes))), question)
        rendered = self.processor.render_chat([*history, ChatMessage("user", parts)])
        media = tuple(self.media(self.scene(index)) for index in scenes)
        segments: list[TextSegment | MediaSegment] = []
        text: list[int] = []
        for item in rendered:
            if isinstance(item, int):
                text.append(item)
                continue
            if text:
                segments.append(TextSegment(tuple(text)))
            text = []
            entry = media[item.index]
            raw = self.processor.image_tokens(entry.width_px, entry.height_px)
            key = image_key(
                entry.pixel_hash,
                self.processor.fingerprint,
                self.model.encoder_fingerprint,
                visual.visual.fingerprint(),
            )
            segments.append(MediaSegment(item.index, key, kept_tokens(visual.visual, raw), raw))
        segments.append(TextSegment(tuple(text)))
        return Request(
            request_id=request_id,
            attempt=0,
            namespace=namespace,
            wire_namespace=namespace,
            prompt=Prompt(tuple(segments)),
            media=media,
            sampling=SamplingParams(**{"max_tokens": 12, **sampling}),
            compression=visual,
        )

    def engine(self, clock: Callable[[], float] | None = None, *, blocks: int | None = None, **config: Any) -> Engine:
        config = {"max_model_len": 1024, "kv_cache_bytes": 64 << 20, **config}
        if blocks is not None:
            decoder = self.model.decoder.config
            block_tokens = config.get("block_tokens", 16)
            token_bytes = decoder.layers * 2 * decoder.kv_heads * decoder.head_dim * 4
            config["kv_cache_bytes"] = blocks * block_tokens * token_bytes
        extra = {} if clock is None else {"clock": clock}
        return Engine(self.model, self.processor, EngineConfig(**config), **extra)

    def drive(self, engine: Engine, steps: int = 2000, *, check: bool = True) -> dict[str, list[TokenOutput]]:
        """Step until nothing is left; outputs by request id."""
        outputs: dict[str, list[TokenOutput]] = {}
        for _ in range(steps):
            if not engine.has_work:
                return outputs
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
            if check:
                engine.check_integrity()
        message = f"still working after {steps} steps"
        raise AssertionError(message)

    def answers(self, engine: Engine, requests: Sequence[Request], *, check: bool = True) -> dict[str, list[int]]:
        """Tokens of each request, all submitted at once as local jobs."""
        for request in requests:
            engine.submit(request, worker="local")
        return tokens_of(self.drive(engine, check=check))


def tokens_of(outputs: dict[str, list[TokenOutput]]) -> dict[str, list[int]]:
    for items in outputs.values():
        assert items[-1].finish_reason in {FinishReason.STOP, FinishReason.LENGTH}, items[-1]
    return {name: [token for item in items for token in item.token_ids] for name, items in outputs.items()}


@pytest.fixture(scope="session")
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture(scope="session")
def text() -> TextWorkshop:
    return TextWorkshop()


@pytest.fixture(scope="session")
def peer(workshop: Workshop) -> Callable[[Request], list[int]]:
    """Greedy tokens by transformers, with the engine's way of ending."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(reference_path(), dtype=torch.float32).eval()
    known: dict[Any, list[int]] = {}

    def generate(request: Request) -> list[int]:
        ids: list[int] = []
        for segment in request.prompt.segments:
            if isinstance(segment, TextSegment):
                ids.extend(segment.token_ids)
            else:
                ids.extend([workshop.processor.image_token_id] * segment.raw_tokens)
        sampling = request.sampling
        pictures = tuple(entry.pixel_hash for entry in request.media)
        name = (tuple(ids), pictures, sampling.max_tokens, sampling.min_tokens)
        if name in known:
            return known[name]
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
        if request.media:
            pixels = [
                workshop.processor.preprocess(Image.open(io.BytesIO(entry.data))).pixels for entry in request.media
            ]
            inputs["pixel_values"] = torch.stack(pixels)
        with torch.inference_mode():
            out = model.generate(
                **inputs, do_sample=False, max_new_tokens=sampling.max_tokens, min_new_tokens=sampling.min_tokens
            )
        known[name] = out[0, len(ids) :].tolist()
        return known[name]

    generate.model = model  # type: ignore[attr-defined]
    return generate
