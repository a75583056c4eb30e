"""``generate`` of transformers: ``python -m benchmarks.engine.systems.serve_transformers DIRECTORY DTYPE THREADS``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.engine.systems.wire import Answer, Clock, Job, Run, serve

PAD = 0


def start() -> tuple[Run, dict[str, Any]]:
    """Load the model with its fused attention."""
    directory, dtype, threads = sys.argv[1:4]
    import torch
    import transformers
    from PIL import Image
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(int(threads))
    config = AutoConfig.from_pretrained(directory)
    sees = getattr(config, "vision_config", None) is not None
    model_class: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = model_class.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    # The checkpoint asks for nothing else; stopping is taken out, so that all systems generate as many tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    images: Any = None
    if sees:
        from transformers import AutoImageProcessor

        images = AutoImageProcessor.from_pretrained(directory)
        side = config.vision_config.image_size // config.vision_config.patch_size

    class Times(BaseStreamer):
        """Notes when each step's tokens come, one per sequence; the first thing put is the prompt."""

        def __init__(self, clock: Clock) -> None:
            self.clock = clock
            self.at_s: list[float] | None = None

        def put(self, value: Any) -> None:  # noqa: ARG002
            if self.at_s is None:
                self.at_s = []
            else:
                self.at_s.append(self.clock())

        def end(self) -> None:
            pass

    def expand(job: Job) -> list[int]:
        if not sees:
            return job.ids
        image = config.image_token_id
        return [token for one in job.ids for token in ([image] * side**2 if one == image else [one])]

    def run(jobs: Sequence[Job], clock: Clock) -> tuple[list[Answer], dict[str, Any]]:
        rows = [expand(job) for job in jobs]
        longest = max(map(len, rows))
        ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        paths = [job.image for job in jobs if job.image]
        if paths:
            pictures = [Image.open(path).convert("RGB") for path in paths]
            pixels = images(pictures, return_tensors="pt")["pixel_values"]
            inputs["pixel_values"] = pixels.to(model.dtype)
        times = Times(clock)
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=jobs[0].tokens, streamer=times)
        answers = [Answer(row, list(times.at_s or ())) for row in out[:, longest:].tolist()]
        return answers, {}

    about = {
        "version": transformers.__version__,
        "torch": torch.__version__,
        "settings": f"generate, {dtype}, sdpa attention, dynamic cache, left padding, {threads} threads",
    }
    return run, about


if __name__ == "__main__":
    serve(start)
