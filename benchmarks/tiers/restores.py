"""How often a restore was slower than computing would have been, in a worker that serves requests."""

from __future__ import annotations

import asyncio
import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benchmarks.workers import SmallCluster, Turn, png
from prismserve.core.types import Role
from prismserve.kv_transfer.tiers.config import TierConfig
from prismserve.models.reference.scenes import make_scene

if TYPE_CHECKING:
    from pathlib import Path

    from prismserve.worker_runtime.runtime import WorkerRuntime

FIRST_SCENE: Final = 20_000_000
_WORDS: Final = ("red", "circle", "left", "of", "the", "blue", "square", "above", "a", "green", "star", "and")
_SETTLE_TIMEOUT_S: Final = 60.0
WARM_PROMPTS: Final = 4
"""Prompts before the ones that count, from which the worker learns its speed."""


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt, computed and asked again with its KV in a tier; times to the first token in seconds, medians."""

    tokens: int
    images: int
    computed_s: float
    again_s: float
    restored: bool

    @property
    def slower(self) -> bool:
        """Whether blocks were restored, and that took longer than computing them."""
        return self.restored and self.again_s > self.computed_s


async def restores(
    prompts: int, repeats: int, tiers: TierConfig, model: str = "reference", *, pictures: bool = True
) -> list[Case]:
    """Ask prompts of many lengths, first with nothing held, then with everything in the tiers and nothing on the device.

    Args:
        prompts: how many.
        repeats: how often each is asked each way; the median counts.
        tiers: of the worker.
        model: checkpoint.
        pictures: whether half of the prompts have one.
    """
    drawn = random.Random(1)
    cases = []
    async with SmallCluster(model) as cluster:
        worker = await cluster.add_here(Role.MIXED, tiers=tiers)
        await cluster.open_router(1)
        limit = worker.engine.max_model_len
        for number in range(-WARM_PROMPTS, prompts):
            turn = _prompt(drawn, number, limit, pictures=pictures)
            case = await _case(cluster, worker, turn, repeats)
            if number >= 0:
                cases.append(case)
    return cases


async def _case(cluster: SmallCluster, worker: WorkerRuntime, turn: Turn, repeats: int) -> Case:
    computed, again, tokens = [], [], 0
    before = worker.tiering.restored_tokens
    for _ in range(repeats):
        _forget_tiers(worker)
        await _forget_device(worker)
        usage = (await cluster.ask(turn)).usage
        computed.append(usage.ttft_ms / 1e3)
        tokens = usage.prompt_tokens
        if not await asyncio.to_thread(worker.tiering.store.drain, _SETTLE_TIMEOUT_S):
            message = "the tiers did not take the blocks in time"
            raise RuntimeError(message)
    for _ in range(repeats):
        await _forget_device(worker)
        again.append((await cluster.ask(turn)).usage.ttft_ms / 1e3)
    restored = worker.tiering.restored_tokens > before
    return Case(tokens, len(turn.pictures), statistics.median(computed), statistics.median(again), restored)


def _prompt(drawn: random.Random, number: int, limit: int, *, pictures: bool) -> Turn:
    """A prompt of its own, from a few words to half of the context; every other one shows a picture."""
    words = drawn.randrange(8, max(9, limit // 4))
    text = " ".join(drawn.choice(_WORDS) for _ in range(words)) + f" {number}?"
    with_picture = pictures and number % 2 == 0
    scene = png(make_scene(FIRST_SCENE + number)[0]) if with_picture else None
    return Turn((text,), () if scene is None else (scene,))


async def _forget_device(worker: WorkerRuntime) -> None:
    await worker.on_engine(lambda engine: engine.clear_prefix_cache())
    worker.engine.image_cache.clear()


def _forget_tiers(worker: WorkerRuntime) -> None:
    for tier in worker.tiering.store.tiers:
        held = tier.keys()
        for key in held:
            tier.drop(key)


def disk_only(folder: Path) -> TierConfig:
    """Every block goes to a file."""
    return TierConfig(host_bytes=0, disk_path=str(folder), disk_bytes=1 << 30)
