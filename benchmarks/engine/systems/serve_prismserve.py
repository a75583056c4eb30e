"""This project's engine: ``python -m benchmarks.engine.systems.serve_prismserve DIRECTORY DTYPE THREADS``."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.engine.systems.wire import Answer, Clock, Job, Run, serve

MODEL_LEN_MAX = 2048
SEQUENCES_MAX = 16


class StepTimes:
    """What steps that only decode take, and how much of it lies outside the model's forward pass."""

    def __init__(self, runner: Any) -> None:
        """Time ``runner.run`` from now on."""
        self._plain: Callable[..., Any] = runner.run
        runner.run = self._timed
        self.clear()

    def clear(self) -> None:
        """Forget the steps so far."""
        self.model_s = self.step_s = 0.0
        self.steps = 0
        self._began(0.0)

    def _began(self, at_s: float) -> None:
        self._step_at_s, self._model_s, self._decodes = at_s, 0.0, 0

    def _timed(self, items: Sequence[Any], *rest: Any) -> Any:
        began = time.perf_counter()
        logits = self._plain(items, *rest)
        self._model_s = time.perf_counter() - began
        self._decodes = len(items) if all(item.tokens == 1 and item.samples for item in items) else 0
        return logits

    def step(self, step: Callable[[], Any], sequences: int) -> Any:
        """Run one step, and count it if it decoded all ``sequences`` and did nothing else."""
        self._began(time.perf_counter())
        outputs = step()
        if self._decodes == sequences:
            self.step_s += time.perf_counter() - self._step_at_s
            self.model_s += self._model_s
            self.steps += 1
        return outputs


def start() -> tuple[Run, dict[str, Any]]:
    """Load the model as a worker does, and warm it."""
    directory, dtype, threads = sys.argv[1:4]
    import torch

    torch.set_num_threads(int(threads))
    import prismserve
    from prismserve.engine.config import EngineConfig
    from prismserve.engine.engine import Engine
    from prismserve.models.loader import load_model
    from prismserve.models.processing import Processor
    from prismserve.worker_runtime.warmup import warm_up

    processor = Processor.from_directory(directory)
    model = load_model(directory, dtype=dtype)
    longest = min(MODEL_LEN_MAX, model.max_model_len)
    config = EngineConfig(max_model_len=longest, kv_cache_bytes=1 << 30, max_running=SEQUENCES_MAX)
    engine = Engine(model, processor, config)
    warm_up(engine, processor, lambda *_: None)
    times = StepTimes(engine._stepper._runner)  # noqa: SLF001 - measured from outside, so that the engine carries no clock for it
    names = itertools.count()

    def run(jobs: Sequence[Job], clock: Clock) -> tuple[list[Answer], dict[str, Any]]:
        times.clear()
        answers: dict[str, Answer] = {}
        for job in jobs:
            name = str(next(names))
            answers[name] = Answer()
            engine.submit(request_of(name, job, processor, model.encoder_fingerprint), worker="local")
        while engine.has_work:
            for output in times.step(engine.step, len(jobs)):
                if output.error:
                    raise RuntimeError(output.error)
                answers[output.request_id].ids.extend(output.token_ids)
                answers[output.request_id].at_s.extend([clock()] * len(output.token_ids))
        spent = {"decode_steps": times.steps, "step_s": times.step_s, "model_s": times.model_s}
        return list(answers.values()), spent

    decoder = model.decoder
    held = sum(weight.numel() * weight.element_size() for weight in decoder.parameters())
    if decoder.head is not decoder.embedding:
        held -= decoder.embedding.weight.nbytes
    about = {
        "version": prismserve.__version__,
        "torch": torch.__version__,
        "decode_weight_bytes": held,
        "settings": f"engine in one process, {str(model.dtype).removeprefix('torch.')}, defaults (chunked prefill, "
        f"prefix caching), {threads} threads",
    }
    return run, about


def request_of(name: str, job: Job, processor: Any, encoder_fingerprint: bytes) -> Any:
    """A request as the router would hand it over: the image stands in a segment of its own."""
    from PIL import Image

    from prismserve.compression.loader import normalise, visual_method
    from prismserve.core.hashing import DIGEST_BYTES
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

    method = visual_method("none" if job.keep is None else "visionzip")
    options = {} if job.keep is None else {"keep": job.keep}
    plan = CompressionPlan(visual=normalise(method, options, "visual"))
    segments: list[TextSegment | MediaSegment] = [TextSegment(tuple(job.ids))]
    media: tuple[MediaInput, ...] = ()
    if job.image:
        data = Path(job.image).read_bytes()
        with Image.open(job.image) as picture:
            width_px, height_px = picture.size
            pixels = sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).digest()
        media = (MediaInput(data, pixels, width_px, height_px),)
        layout = processor.image_layout(width_px, height_px)
        kept = method.kept_tokens(method.Config(**options), layout.tokens)
        key = image_key(pixels, processor.image_fingerprint(1), encoder_fingerprint, plan.visual.fingerprint())
        place = job.ids.index(processor.image_token_id)
        segments = [
            TextSegment(tuple(job.ids[:place])),
            MediaSegment(0, key, kept, layout.tokens, layout.position_span),
            TextSegment(tuple(job.ids[place + 1 :])),
        ]
    namespace = bytes(DIGEST_BYTES)
    prompt = Prompt(tuple(segment for segment in segments if segment.tokens))
    sampling = SamplingParams(max_tokens=job.tokens, ignore_eos=True)
    return Request(name, 0, namespace, namespace, prompt, media, sampling, plan)


if __name__ == "__main__":
    serve(start)
