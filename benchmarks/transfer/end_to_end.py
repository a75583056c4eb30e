"""What moving KV costs a request through a whole cluster: the part of its time to first token, and bytes per image."""

from __future__ import annotations

import asyncio
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from benchmarks.demo_accuracy import Score, Setting, ask_all, draw_questions, encode
from benchmarks.engine.checkpoints import LLAVA, llava
from prismserve.client import AsyncClient
from prismserve.cluster.served import ServedCluster

IMAGES: Final = 12
PER_FAMILY: Final = 30
VISUAL_TOKENS: Final = (LLAVA.image_px // LLAVA.patch_px) ** 2
PLANS: Final[Mapping[str, Any]] = {
    f"off, {VISUAL_TOKENS} tokens": "off",
    "int8, 64 tokens": {"visual": {"method": "visionzip", "keep": 64}, "wire": {"codec": "int8"}},
}
QUALITY: Final = ("off", "quality", "balanced", "turbo")
_FLAGS: Final = ("--prefill-replicas", "1", "--decode-replicas", "1")
_ASK_TIMEOUT_S: Final = 300.0
_QUESTION: Final = "What is in the picture?"


@dataclass(frozen=True, slots=True)
class Exposure:
    """What one plan's requests took, medians over the images.

    Attributes:
        plan: as the table names it.
        ttft_ms: time to first token.
        exposed_ms: what of it was waiting for KV to arrive and be verified.
        share: median over the images of exposed over time to first token.
        kv_bytes_sent: between the workers.
        transport: that was used.
    """

    plan: str
    ttft_ms: float
    exposed_ms: float
    share: float
    kv_bytes_sent: float
    transport: str


@dataclass(frozen=True, slots=True)
class Quality:
    """Accuracy and bytes of one preset on the reference model; ``share`` is of the bytes without compression."""

    preset: str
    score: Score
    kv_bytes_sent: float
    share: float


def exposures(cache: Path, images: int) -> list[Exposure]:
    """Ask a cluster about pictures it has never seen, one at a time, the plans in turns."""
    directory = llava(cache, LLAVA)
    with ServedCluster(("--model", str(directory), *_FLAGS)) as cluster:
        return asyncio.run(_exposures(cluster.addresses.grpc, images))


async def _exposures(target: str, images: int) -> list[Exposure]:
    found: dict[str, list[Any]] = {plan: [] for plan in PLANS}
    async with AsyncClient(target, timeout_s=_ASK_TIMEOUT_S) as client:
        for number in range(images + 1):
            for place, (plan, compression) in enumerate(PLANS.items()):
                picture = _noise(number * len(PLANS) + place)
                answer = await client.generate(
                    _QUESTION, images=[picture], compression=compression, temperature=0.0, max_tokens=2
                )
                if number:  # the first of each plan opens links and warms caches
                    found[plan].append(answer.usage)
    return [_exposure(plan, usages) for plan, usages in found.items()]


def _exposure(plan: str, usages: Sequence[Any]) -> Exposure:
    return Exposure(
        plan=plan,
        ttft_ms=statistics.median(usage.ttft_ms for usage in usages),
        exposed_ms=statistics.median(usage.transfer_exposed_ms for usage in usages),
        share=statistics.median(usage.transfer_exposed_ms / usage.ttft_ms for usage in usages),
        kv_bytes_sent=statistics.median(usage.kv_bytes_sent for usage in usages),
        transport=" ".join(sorted({usage.transport for usage in usages})),
    )


def _noise(seed: int) -> bytes:
    """A picture nobody has cached, as a PNG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (LLAVA.image_px, LLAVA.image_px, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def qualities(per_family: int, timeout_s: float = 3600.0) -> list[Quality]:
    """The same held-out questions under each preset; TimeoutError after ``timeout_s``."""
    questions = draw_questions(per_family)
    pictures = {question.seed: encode(question.seed) for question in questions}
    pairs = [(question, pictures[question.seed]) for question in questions]

    async def ask(target: str) -> list[Quality]:
        found: list[Quality] = []
        async with asyncio.timeout(timeout_s), AsyncClient(target, timeout_s=_ASK_TIMEOUT_S) as client:
            for preset in QUALITY:
                scored = await ask_all(client, Setting(preset, 0, preset), pairs, 4, lambda: None)
                score = Score(right=sum(entry.right for entry in scored), asked=len(scored))
                sent = statistics.fmean(entry.kv_bytes_sent for entry in scored)
                found.append(Quality(preset, score, sent, sent / (found[0].kv_bytes_sent if found else sent)))
        return found

    with ServedCluster(("--model", "reference", *_FLAGS)) as cluster:
        return asyncio.run(ask(cluster.addresses.grpc))
