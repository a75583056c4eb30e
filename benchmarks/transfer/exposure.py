"""What the transfer of KV adds to the time to first token of a LLaVA-shaped model, plan by plan."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from benchmarks.engine.checkpoints import Shape, llava
from benchmarks.workers import SmallCluster, Turn, png
from prismserve.core.types import Role
from prismserve.kv_transfer.config import TransferConfig

if TYPE_CHECKING:
    from prismserve.router.usage import Usage

CODECS: Final = ("none", "int8", "int4")
FEW_TOKENS: Final = 64
_PATIENCE_S: Final = 900.0
PATIENT: Final[Mapping[str, Any]] = {
    "transfer": TransferConfig(arena_bytes=64 << 20, lease_ttl_s=_PATIENCE_S, notify_timeout_s=_PATIENCE_S),
    "kv_wait_timeout_s": _PATIENCE_S,
    "peer_timeout_s": _PATIENCE_S,
}
"""Of workers: on a machine that others keep busy a prefill may take minutes, and must not be given up."""
PATIENT_ROUTER: Final[Mapping[str, Any]] = {"request_timeout_s": _PATIENCE_S, "worker_silence_s": _PATIENCE_S}
_QUESTION: Final = "What is in the picture?"
_METHOD: Final = "visionzip"
_TEMPLATE_FILE: Final = "chat_template.jinja"
_TEMPLATE: Final = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}assistant:"
)


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
    shape: Shape,
    cache: Path,
    rounds: int,
    start_timeout_s: float,
    limit_s: float,
    say: Callable[[str], None],
) -> list[Exposure]:
    """Ask one prefill and one decode worker about pictures they have never seen, one at a time, the plans in turns.

    Args:
        shape: of the checkpoint, made in ``cache`` if it is not there yet.
        cache: folder of checkpoints.
        rounds: pictures for each plan, behind a few that are not counted.
        start_timeout_s: how long workers may take to be ready.
        limit_s: so long after the workers are ready no round is begun, but the first that counts.
        say: told what is being done.
    """
    directory = _with_chat(llava(cache, shape))
    asked = plans(shape)
    found: list[list[Usage]] = [[] for _ in asked]
    pictures = _pictures(shape)
    async with SmallCluster(str(directory), start_timeout_s=start_timeout_s, say=say) as cluster:
        await asyncio.gather(*(cluster.add_process(role, **PATIENT) for role in (Role.PREFILL, Role.DECODE)))
        await cluster.open_router(2, **PATIENT_ROUTER)
        deadline_s = time.monotonic() + limit_s
        # Every codec and both sizes once, uncounted: links are opened, kernels loaded, allocators warm.
        for plan in (asked[0], *asked[len(CODECS) :]):
            await cluster.ask(_turn(plan, next(pictures)))
        say("links are open and every codec has been used")
        for number in range(1, rounds + 1):
            if number > 1 and time.monotonic() >= deadline_s:
                break
            for plan, usages in zip(asked, found, strict=True):
                answer = await cluster.ask(_turn(plan, next(pictures)))
                usages.append(answer.usage)
                say(f"round {number} of {rounds}: {_told(plan, answer.usage)}")
    return [summarise(plan, usages) for plan, usages in zip(asked, found, strict=True)]


def _turn(plan: Plan, picture: bytes) -> Turn:
    return Turn((_QUESTION,), (picture,), max_tokens=2, compression=plan.compression)


def _told(plan: Plan, usage: Usage) -> str:
    exposed = f"{usage.transfer_exposed_ms:.1f} of {usage.ttft_ms:.0f} ms exposed"
    return f"{plan.visual_tokens} visual tokens, {plan.codec}: {exposed}"


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


def _with_chat(checkpoint: Path) -> Path:
    """The same checkpoint beside it with a chat template that places images, which the benchmark of engines needs not."""
    folder = checkpoint.with_name(f"{checkpoint.name}-chat")
    folder.mkdir(exist_ok=True)
    for path in checkpoint.iterdir():
        link = folder / path.name
        if path.name != _TEMPLATE_FILE and not link.exists():
            link.symlink_to(path)
    (folder / _TEMPLATE_FILE).write_text(_TEMPLATE, encoding="utf-8")
    return folder


def _pictures(shape: Shape) -> Iterator[bytes]:
    """Noise, each time another, as files."""
    random = np.random.default_rng(0)
    while True:
        yield png(Image.fromarray(random.integers(0, 256, (shape.image_px, shape.image_px, 3), dtype=np.uint8)))
