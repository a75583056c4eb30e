"""Replays requests while workers are idle, and lets the judge know what came out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prismserve.core.errors import PrismServeError
from prismserve.router.fidelity.compare import Answer, compare
from prismserve.router.fidelity.judge import CHAIN, EXACT, Control
from prismserve.router.fidelity.queue import ReplayQueue
from prismserve.router.generation import TextDelta

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

    from prismserve.core.types import CompressionPlan, TokenLogprobs
    from prismserve.router.calls import Call
    from prismserve.router.fidelity.config import FidelityConfig
    from prismserve.router.fidelity.judge import Judge
    from prismserve.router.fidelity.metrics import FidelityMetrics
    from prismserve.router.fidelity.queue import Entry
    from prismserve.router.generation import GenerationEvent
    from prismserve.router.requests import Prepared

    Build = Callable[[Call, Prepared, str | None, int], Awaitable[Prepared]]
    Generate = Callable[[Prepared, float], AsyncGenerator[GenerationEvent, None]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """A request that was answered: its text without the caller's body, and its images as they were read."""

    call: Call
    prepared: Prepared


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the guard does to the rest of the router, and sees of it.

    Attributes:
        build: the request of a call again under a preset (None: under its own plan), greedy, with log-probabilities, at
            most so many tokens.
        generate: its answer, within so many seconds.
        idle: whether no worker has anything to do.
        crowded: whether workers have more to do than one replay.
        stands_for: of each preset, what it does to the served model and what that loses, for the status document.
    """

    build: Build
    generate: Generate
    idle: Callable[[], bool]
    crowded: Callable[[], bool]
    stands_for: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class FidelityGuard:
    """Owns the queue of replays and the task that works on it.

    Args:
        config: share, bounds and patience.
        judge: told of every comparison that says something about a preset.
        metrics: told of every replay.
        surroundings: see :class:`Surroundings`.
        clock: seconds, monotonic.
        draw: a random number from 0 to below 1.
    """

    def __init__(
        self,
        config: FidelityConfig,
        judge: Judge,
        metrics: FidelityMetrics,
        surroundings: Surroundings,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float],
    ) -> None:
        self._config = config
        self._judge = judge
        self._metrics = metrics
        self._around = surroundings
        self._queue: ReplayQueue[Sample] = ReplayQueue(config, clock, draw)
        self._waiting = asyncio.Event()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to replay; nothing is ever replayed where the share is 0."""
        if self._config.share > 0:
            self._task = asyncio.create_task(self._run(), name="fidelity")

    async def stop(self) -> None:
        """Cancel what runs, and forget what waits."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # ---- told by the service -----------------------------------------------------------------------------------

    def arrived(self) -> None:
        """A request has come: a replay that runs gives way at once."""
        self._arrived.set()

    def finished(self, call: Call, prepared: Prepared) -> None:
        """A request was answered; it may be kept for a replay."""
        if self._task is None or not _telling(prepared) or not self._queue.chosen():
            return
        # The body and the encoded pictures in it are not kept, only what the workers were sent.
        slim = dataclasses.replace(call, options={}, media=(), compression=None)
        nbytes = sum(len(item.data) for item in prepared.request.media)
        if self._queue.offer(Sample(slim, prepared), nbytes):
            self._waiting.set()
        else:
            self._metrics.outcome("refused")

    def control(self, preset: str, control: Control) -> None:
        """An operator's word about a preset; InvalidRequestError if it cannot step back."""
        self._judge.control(preset, control)
        self._show()
        logger.warning("preset %s: an operator says %s", preset, control.value)

    def status(self) -> dict[str, Any]:
        """For the status document."""
        return {
            "share": self._config.share,
            "step_back": self._config.step_back,
            "queue": self._queue.status(),
            "presets": {name: entry | self._told(name) for name, entry in self._judge.status().items()},
        }

    def _told(self, preset: str) -> dict[str, Any]:
        told = self._around.stands_for.get(preset)
        return {} if told is None else {"stands_for": dict(told)}

    # ---- replays -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._waiting.wait()
            await asyncio.sleep(self._config.idle_check_s)
            expired = self._queue.expire()
            if expired:
                self._metrics.outcome("expired", expired)
            if not len(self._queue):
                self._waiting.clear()
            elif self._around.idle():
                entry = self._queue.take()
                if entry is not None:
                    await self._attend(entry)

    async def _attend(self, entry: Entry[Sample]) -> None:
        """Replay one request; when others need the workers it is interrupted and waits again."""
        self._arrived.clear()
        replay = asyncio.create_task(self._replay(entry.item))
        arrival = asyncio.create_task(self._arrived.wait())
        try:
            while not replay.done() and not arrival.done() and not self._around.crowded():
                tasks = {replay, arrival}
                await asyncio.wait(tasks, timeout=self._config.idle_check_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            arrival.cancel()
            replay.cancel()
            await asyncio.gather(arrival, replay, return_exceptions=True)
        if replay.cancelled():
            if not self._queue.put_back(entry):
                self._metrics.outcome("interrupted")
            return
        error = replay.exception()
        if error is None:
            self._metrics.outcome("compared")
            return
        self._metrics.outcome("failed")
        if isinstance(error, PrismServeError):
            logger.info("a replay failed: %s", error.message)
        else:
            logger.error("a replay failed unexpectedly", exc_info=error)

    async def _replay(self, sample: Sample) -> None:
        exact, _ = await self._answer(sample, EXACT)
        if not sample.prepared.request.compression.exact:
            answer, plan = await self._answer(sample, None)
            self._note(sample, plan, exact, answer)
        probe = self._judge.probe(sample.prepared.preset_asked)
        if probe is not None and sample.prepared.request.media:
            answer, plan = await self._answer(sample, probe)
            self._note(sample, plan, exact, answer)

    async def _answer(self, sample: Sample, preset: str | None) -> tuple[Answer, CompressionPlan]:
        """The first tokens of the greedy answer under a preset, or under the plan that was served."""
        config = self._config
        prepared = await self._around.build(sample.call, sample.prepared, preset, config.replay_tokens)
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        async with contextlib.aclosing(self._around.generate(prepared, config.replay_timeout_s)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    tokens += event.token_ids
                    logprobs += event.logprobs
        return Answer(tuple(tokens), tuple(logprobs)), prepared.request.compression

    def _note(self, sample: Sample, plan: CompressionPlan, exact: Answer, answer: Answer) -> None:
        comparison = compare(exact, answer)
        request = sample.prepared.request
        self._metrics.compared(request.tenant, plan, plan.preset, comparison)
        # Text alone says nothing about what a preset does to images.
        direction = self._judge.record(plan.preset, comparison) if request.media else None
        if direction is not None:
            self._metrics.stepped(plan.preset, direction)
            entry = self._judge.status()[plan.preset]
            logger.warning("preset %s steps %s: %s", plan.preset, direction, entry["reason"])
            self._show()

    def _show(self) -> None:
        states = self._judge.status()
        for preset in CHAIN:
            self._metrics.held(preset, held=states[preset]["held"])


def _telling(prepared: Prepared) -> bool:
    """Whether a replay would say something: visual tokens may have left, or KV was encoded with loss."""
    plan = prepared.request.compression
    if not prepared.request.media:
        return plan.wire.name != "none"
    return bool(prepared.preset_asked) or not plan.exact
