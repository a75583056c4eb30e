"""vLLM's offline engine on a CPU: ``python -m benchmarks.engine.systems.serve_vllm DIRECTORY DTYPE THREADS``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.engine.systems.wire import Answer, Clock, Job, Run, serve

MODEL_LEN_MAX = 2048
SEQUENCES_MAX = 16


def start() -> tuple[Run, dict[str, Any]]:
    """Load the model in this process with vLLM's own defaults: chunked prefill, prefix caching, compiled model."""
    directory, dtype, threads = sys.argv[1:4]
    import torch
    import vllm
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(
        model=directory,
        dtype=dtype,
        max_model_len=MODEL_LEN_MAX,
        max_num_seqs=SEQUENCES_MAX,
        seed=0,
        disable_log_stats=True,
    )
    engine = llm.llm_engine
    names = itertools.count()

    def run(jobs: Sequence[Job], clock: Clock) -> tuple[list[Answer], dict[str, Any]]:
        answers: dict[str, Answer] = {}
        for job in jobs:
            prompt: dict[str, Any] = {"prompt_token_ids": job.ids}
            if job.image:
                prompt["multi_modal_data"] = {"image": Image.open(job.image).convert("RGB")}
            params = SamplingParams(
                temperature=0.0,
                max_tokens=job.tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            name = str(next(names))
            answers[name] = Answer()
            engine.add_request(name, prompt, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                answer, fresh = answers[output.request_id], output.outputs[0].token_ids
                answer.ids.extend(fresh)
                answer.at_s.extend([clock()] * len(fresh))
        return list(answers.values()), {}

    about = {
        "version": vllm.__version__,
        "torch": torch.__version__,
        "settings": f"offline engine in one process, {dtype}, defaults (chunked prefill, prefix caching), {threads} threads bound",
    }
    return run, about


if __name__ == "__main__":
    serve(start)
