"""The same through a router, a prefill worker and a decode worker, each worker in a process of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from typing import TYPE_CHECKING, Self

from benchmarks.load.local import KV_BYTES, MODEL_LEN_MAX, SEQUENCES_MAX
from benchmarks.load.work import Answered, Asked, Ran
from benchmarks.workers import DTYPE, SmallCluster
from prismserve.core.types import Role
from prismserve.engine.config import EngineConfig
from prismserve.kv_transfer.config import TransferConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Served:
    """KV crosses from the one worker to the other; an asynchronous context manager."""

    def __init__(self, directory: Path, threads: int) -> None:
        self._cluster = SmallCluster(str(directory))
        self._threads = max(1, threads // 2)
        self._salts = itertools.count()
        self.about = f"a router here, a prefill and a decode process, {DTYPE}, {self._threads} threads each"

    async def __aenter__(self) -> Self:
        await self._cluster.__aenter__()
        try:
            for role in (Role.PREFILL, Role.DECODE):
                engine = EngineConfig(max_model_len=MODEL_LEN_MAX, kv_cache_bytes=KV_BYTES, max_running=SEQUENCES_MAX)
                transfer = TransferConfig()
                await self._cluster.add_process(role, engine=engine, transfer=transfer, threads=self._threads)
            await self._cluster.open_router(2)
        except BaseException:
            await self._cluster.__aexit__()
            raise
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._cluster.__aexit__()

    async def run(self, turns: Sequence[Asked]) -> Ran:
        """See :class:`benchmarks.load.work.System`."""
        salt = f"run-{next(self._salts)}"
        began = time.monotonic()
        found = await asyncio.gather(*(self._cluster.ask(dataclasses.replace(turn, salt=salt)) for turn in turns))
        wall_s = time.monotonic() - began
        answers = []
        for answer, turn in zip(found, turns, strict=True):
            usage = answer.usage
            if usage.completion_tokens != turn.max_tokens:
                message = f"a request gave {usage.completion_tokens} tokens, asked for {turn.max_tokens}"
                raise RuntimeError(message)
            answers.append(
                Answered(
                    usage.ttft_ms / 1000,
                    usage.completion_tokens,
                    usage.visual_tokens_before,
                    usage.visual_tokens_after,
                    usage.kv_bytes_after,
                    usage.kv_bytes_sent,
                    usage.encode_ms,
                )
            )
        return Ran(tuple(answers), wall_s, 0)
