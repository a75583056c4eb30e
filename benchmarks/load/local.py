"""An engine in this process, given requests as the router prepares them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, Self

import torch

from benchmarks.load.work import Answered, Asked, Ran
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.models.loader import encoder_fingerprint, load_model
from prismserve.models.processing import Processor
from prismserve.router.config import RouterConfig
from prismserve.router.media import MediaReader
from prismserve.router.requests import ModelFacts, RequestBuilder
from prismserve.worker_runtime.warmup import warm_up

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from prismserve.core.types import PrefillReport

MODEL_LEN_MAX: Final = 1024
KV_BYTES: Final = 1 << 30
SEQUENCES_MAX: Final = 64


class LocalEngine:
    """Prefills and decodes here; the clock starts with the calls, so reading pictures and tokenizing count.

    An asynchronous context manager.
    """

    def __init__(self, directory: Path, threads: int) -> None:
        """Load and warm the model."""
        torch.set_num_threads(threads)
        self._processor = Processor.from_directory(directory)
        model = load_model(directory)
        length = min(MODEL_LEN_MAX, model.max_model_len)
        config = EngineConfig(max_model_len=length, kv_cache_bytes=KV_BYTES, max_running=SEQUENCES_MAX)
        self._engine = Engine(model, self._processor, config)
        encoder = encoder_fingerprint(model.fingerprint)
        facts = ModelFacts("load", model.fingerprint, encoder, self._engine.layout, length)
        self._media = MediaReader(RouterConfig())
        self._builder = RequestBuilder(self._processor, facts, RouterConfig(), self._media, "off")
        warm_up(self._engine, self._processor, lambda *_: None)
        layout = self._engine.layout
        self.about = (
            f"one engine in this process, {layout.dtype}, {threads} threads, {layout.token_bytes} bytes of KV a token, "
            f"blocks of {layout.block_tokens} tokens"
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._builder.close()
        self._media.close()
        self._engine.constraints.close()

    async def run(self, turns: Sequence[Asked]) -> Ran:
        """See :class:`benchmarks.load.work.System`."""
        engine = self._engine
        engine.forget()
        began = time.perf_counter()
        prepared = await asyncio.gather(*(self._builder.build(turn.call()) for turn in turns))
        for item in prepared:
            engine.submit(item.request, worker="local")
        names = [item.request.request_id for item in prepared]
        firsts: dict[str, tuple[float, PrefillReport]] = {}
        tokens = dict.fromkeys(names, 0)
        peak = 0
        while engine.has_work:
            outputs = engine.step()
            at_s = time.perf_counter() - began
            peak = max(peak, engine.stats().kv_blocks_used)
            for output in outputs:
                if output.error:
                    raise RuntimeError(output.error)
                tokens[output.request_id] += len(output.token_ids)
                if output.report is not None:
                    firsts[output.request_id] = (at_s, output.report)
        wall_s = time.perf_counter() - began
        answers = []
        for item, turn in zip(prepared, turns, strict=True):
            name = item.request.request_id
            if tokens[name] != turn.max_tokens:
                message = f"a request gave {tokens[name]} tokens, asked for {turn.max_tokens}"
                raise RuntimeError(message)
            first_s, report = firsts[name]
            segments = list(item.request.prompt.media_segments())
            before, after = sum(s.raw_tokens for s in segments), sum(s.tokens for s in segments)
            left = report.visual_tokens_by_cut[-1] if report.visual_tokens_by_cut else after
            answers.append(Answered(first_s, tokens[name], before, left, report.kv_bytes_kept, 0, report.encode_ms))
        return Ran(tuple(answers), wall_s, peak)
