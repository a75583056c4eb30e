"""The first forward passes of a worker, before anybody waits for them: kernels are chosen, caches and buffers made."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

from prismserve.compression.loader import codec, normalise, visual_method
from prismserve.core.errors import EngineError
from prismserve.core.hashing import DIGEST_BYTES, digest
from prismserve.core.types import (
    CompressionPlan,
    FinishReason,
    MediaInput,
    MediaSegment,
    Prompt,
    Request,
    SamplingParams,
    TextSegment,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismserve.engine.engine import Engine
    from prismserve.models.processing import Processor

PASSES = 2
NEW_TOKENS = 4
TEXT_TOKENS = 24
SIDE_PX = 64
STEPS_MAX = 200


def warm_up(engine: Engine, processor: Processor, progress: Callable[[str, int, int], None]) -> None:
    """Serve a made-up request twice, an image included where the model sees, then forget it.

    Args:
        engine: not yet driven by its loop.
        processor: of the same checkpoint.
        progress: called with ("warm-up", passes done, passes in all).

    Raises:
        EngineError: the model cannot run; better now than with the first request.
    """
    for attempt in range(PASSES):
        progress("warm-up", attempt, PASSES)
        engine.submit(_request(engine, processor, attempt), worker="local")
        for _ in range(STEPS_MAX):
            if not engine.has_work:
                break
            for output in engine.step():
                if output.finish_reason is FinishReason.ERROR:
                    message = f"the model does not run: {output.error}"
                    raise EngineError(message)
    progress("warm-up", PASSES, PASSES)
    engine.forget()


def _request(engine: Engine, processor: Processor, attempt: int) -> Request:
    plan = CompressionPlan(
        normalise(visual_method("none"), {}, "compression.visual"), normalise(codec("none"), {}, "compression.wire")
    )
    text = TextSegment(tuple(range(TEXT_TOKENS)))
    segments: tuple[TextSegment | MediaSegment, ...] = (text,)
    media: tuple[MediaInput, ...] = ()
    if processor.supports_images:
        tokens = processor.image_tokens(SIDE_PX, SIDE_PX)
        if tokens + TEXT_TOKENS + NEW_TOKENS <= engine.max_model_len:
            stream = io.BytesIO()
            Image.new("RGB", (SIDE_PX, SIDE_PX)).save(stream, "PNG")
            key = digest("image", b"warm-up", attempt.to_bytes(1, "little"))
            media = (MediaInput(stream.getvalue(), key, SIDE_PX, SIDE_PX),)
            segments = (MediaSegment(0, key, tokens, tokens), text)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    return Request(
        request_id="warm-up",
        attempt=attempt,
        namespace=bytes(DIGEST_BYTES),
        wire_namespace=bytes(DIGEST_BYTES),
        prompt=Prompt(segments),
        media=media,
        sampling=sampling,
        compression=plan,
    )
