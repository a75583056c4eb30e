"""What the transfer of KV adds to the time to first token of a LLaVA-shaped model, plan by plan."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from benchmarks.engine.checkpoints import Shape, llava
from benchmarks.workers import SmallCluster, Turn, png
from prismserve.core.types import Role

if TYPE_CHECKING:
    from prismserve.router.usage import Usage

CODECS: Final = ("none", "int8", "int4")
FEW_TOKENS: Final = 64
_QUESTION: Final = "What is in the picture?"
_METHOD: Final = "visionzip"


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to serve; ``target`` is the share of TTFT its exposed transfer may take, where one is set."""

    visual_tokens: int
    codec: str
    compression: Mapping[str, Any]
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Exposure:
    """What one plan's requests took, medians over the pictures.

    Attributes:
        visual_tokens: the language model saw.
        codec: of the wire.
        target: most that ``share`` may be; None where none is set.
        ttft_ms: time to first token at the router.
        encode_ms: of it, encoding the picture.
        prefill_ms: of it, computing the prompt.
        exposed_ms: of it, waiting for KV to arrive and be verified.
        share: exposed over time to first token.
        share_max: the largest of any picture.
        bound: what was neither encoding nor prefill, over time to first token: the exposed transfer, every call between
            router and workers, and preparing the picture. No transfer can have cost more.
        kv_bytes_sent: between the workers.
        transport: that was used.
        pictures: asked about.
    """

    visual_tokens: int
    codec: str
    target: float | None
    ttft_ms: float
    encode_ms: float
    prefill_ms: float
    exposed_ms: float
    share: float
    share_max: float
    bound: float
    kv_bytes_sent: float
    transport: str
    pictures: int

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None where none is set."""
        return None if self.target is None else self.share <= self.target


def plans(shape: Shape) -> tuple[Plan, ...]:
    """All visual tokens and few of them, each under every codec."""
    every = (shape.image_px // shape.patch_px) ** 2
    few = min(FEW_TOKENS, every // 2)
    targets = {(every, "none"): 0.05, (few, "int8"): 0.02}
    return tuple(
        Plan(tokens, codec, {"visual": visual, "wire": {"codec": codec}}, targets.get((tokens, codec)))
        for tokens, visual in ((every, {"method": "none"}), (few, {"method": _METHOD, "keep": few}))
        for codec in CODECS
    )


async def measure(
    shape: Shape, cache: Path, rounds: int, start_timeout_s: float, say: Callable[[str], None]
) -> list[Exposure]:
    """Ask one prefill and one decode worker about pictures they have never seen, one at a time, the plans in turns.

    Args:
        shape: of the checkpoint, made in ``cache`` if it is not there yet.
        cache: folder of checkpoints.
        rounds: pictures for each plan, beside a first one that is not counted: it opens links and warms up.
        start_timeout_s: how long workers may take to be ready.
        say: told what is being done.
    """
    directory = llava(cache, shape)
    asked = plans(shape)
    found: dict[Plan, list[Usage]] = {}
    pictures = _pictures(shape)
    async with SmallCluster(str(directory), start_timeout_s=start_timeout_s, say=say) as cluster:
        for role in (Role.PREFILL, Role.DECODE):
            await cluster.add_process(role)
        await cluster.open_router(2)
        for number in range(rounds + 1):
            for plan in asked:
                turn = Turn((_QUESTION,), (next(pictures),), max_tokens=2, compression=plan.compression)
                answer = await cluster.ask(turn)
                if number:
                    found.setdefault(plan, []).append(answer.usage)
            say(f"round {number} of {rounds}" + ("" if number else " (not counted)"))
    return [summarise(plan, usages) for plan, usages in found.items()]


def summarise(plan: Plan, usages: Sequence[Usage]) -> Exposure:
    """Fold one plan's reports into its row."""

    def median(value: Callable[[Usage], float]) -> float:
        return statistics.median(map(value, usages))

    return Exposure(
        visual_tokens=usages[0].visual_tokens_after,
        codec=plan.codec,
        target=plan.target,
        ttft_ms=median(lambda usage: usage.ttft_ms),
        encode_ms=median(lambda usage: usage.encode_ms),
        prefill_ms=median(lambda usage: usage.prefill_ms),
        exposed_ms=median(lambda usage: usage.transfer_exposed_ms),
        share=median(lambda usage: usage.transfer_exposed_ms / usage.ttft_ms),
        share_max=max(usage.transfer_exposed_ms / usage.ttft_ms for usage in usages),
        bound=median(lambda usage: 1.0 - (usage.encode_ms + usage.prefill_ms) / usage.ttft_ms),
        kv_bytes_sent=median(lambda usage: usage.kv_bytes_sent),
        transport=" ".join(sorted({usage.transport for usage in usages})),
        pictures=len(usages),
    )


def document(rows: Sequence[Exposure]) -> list[dict[str, Any]]:
    """The rows as plain data, with the verdicts."""
    return [dataclasses.asdict(row) | {"met": row.met} for row in rows]


def _pictures(shape: Shape) -> Iterator[bytes]:
    """Noise, each time another, as files."""
    random = np.random.default_rng(0)
    while True:
        yield png(Image.fromarray(random.integers(0, 256, (shape.image_px, shape.image_px, 3), dtype=np.uint8)))
