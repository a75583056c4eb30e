"""Replays run when workers are idle, give way at once, and reach the judge and the metrics."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from prismserve.compression import presets
from prismserve.core.errors import WorkerUnavailableError
from prismserve.core.types import FinishReason, MediaInput, Prompt, Request, SamplingParams, TextSegment, TokenLogprobs
from prismserve.models.processing import ChatMessage
from prismserve.router.calls import Call
from prismserve.router.fidelity.config import FidelityConfig
from prismserve.router.fidelity.guard import FidelityGuard, Surroundings
from prismserve.router.fidelity.judge import Control, Judge
from prismserve.router.fidelity.metrics import FidelityMetrics
from prismserve.router.generation import Finished, TextDelta
from prismserve.router.media import ImageSource
from prismserve.router.requests import Prepared

PICTURE = MediaInput(b"x" * 100, bytes(32), 8, 8)
CALL = Call(
    options={"messages": "a large body"},
    messages=(ChatMessage("user", ("what?",)),),
    media=(ImageSource(b"x", "image"),),
)


def prepared(compression, *, media=(PICTURE,), preset_asked=""):
    plan = presets.resolve(compression, "off")
    root = bytes(32)
    prompt = Prompt((TextSegment((1, 2)),))
    request = Request("r", 0, root, root, prompt, media, SamplingParams(max_tokens=8), plan, tenant="acme")
    return Prepared(request, (), (), preset_asked)


@dataclass
class Router:
    """Stands for the rest of the router: plans under which answers differ from the exact one, and what is asked."""

    differing: set = field(default_factory=set)
    idle: bool = True
    crowded: bool = False
    pause_s: float = 0.0
    fail: bool = False
    asked: list = field(default_factory=list)
    calls: list = field(default_factory=list)
    closed: int = 0

    async def build(self, call, served, preset, max_tokens):
        self.calls.append(call)
        plan = served.request.compression if preset is None else presets.resolve(preset, "off")
        request = served.request
        again = Request(
            "again", 0, bytes(32), bytes(32), request.prompt, request.media, SamplingParams(max_tokens=max_tokens), plan
        )
        return Prepared(again, (), ())

    async def generate(self, again, timeout_s):
        assert timeout_s == 3.0
        plan = again.request.compression
        self.asked.append(plan.preset)
        try:
            if self.fail:
                message = "no worker"
                raise WorkerUnavailableError(message)
            await asyncio.sleep(self.pause_s)
            token = 7 if plan.preset in self.differing else 5
            for at in (1, token):
                yield TextDelta("x", (at,), (TokenLogprobs(-0.1, ((at, -0.1),)),))
            yield Finished(FinishReason.STOP, None)
        finally:
            self.closed += 1


@contextlib.asynccontextmanager
async def running(router, **config):
    settings = FidelityConfig(
        **{"share": 1.0, "idle_check_s": 0.01, "samples_min": 4, "window": 8, "replay_timeout_s": 3.0, **config}
    )
    registry = CollectorRegistry()
    judge = Judge(settings, asyncio.get_running_loop().time)
    around = Surroundings(router.build, router.generate, lambda: router.idle, lambda: router.crowded)
    guard = FidelityGuard(settings, judge, FidelityMetrics(registry, "m", 8), around, draw=lambda: 0.5)
    guard.start()
    try:
        yield (
            guard,
            judge,
            lambda kind: registry.get_sample_value(
                "prismserve:fidelity_replays_total", {"model_name": "m", "outcome": kind}
            ),
        )
    finally:
        await guard.stop()


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_bad_preset_is_found_and_stepped_back():
    router = Router(differing={"turbo"})
    async with running(router) as (guard, judge, outcome):
        for _ in range(4):
            guard.finished(CALL, prepared("turbo"))
        # A replay is counted when all of it is done, and steps back before.
        await until(lambda: outcome("compared") == 4)
        assert judge.in_force("turbo") == "balanced"
        assert router.asked == ["off", "turbo"] * 4
        assert guard.status()["presets"]["turbo"]["reason"].startswith("4 of 4")


async def test_replays_of_a_preset_that_is_stepped_back_bring_it_back_when_it_is_good_again():
    router = Router()
    async with running(router, recover_after_s=0.001) as (guard, judge, _):
        guard.control("turbo", Control.AUTO)
        judge._presets["turbo"].stepped_back = True
        for _ in range(4):
            guard.finished(CALL, prepared("balanced", preset_asked="turbo"))
        await until(lambda: judge.in_force("turbo") == "turbo")
        assert router.asked == ["off", "balanced", "turbo"] * 4


async def test_what_stepped_back_to_off_is_still_probed():
    router = Router()
    async with running(router) as (guard, judge, outcome):
        for entry in judge._presets.values():
            entry.stepped_back = True
        guard.finished(CALL, prepared("off", preset_asked="turbo"))
        await until(lambda: outcome("compared") == 1)
        assert router.asked == ["off", "quality"]


@pytest.mark.parametrize("what", [prepared("off"), prepared("quality", media=())])
async def test_what_compression_cannot_have_changed_is_not_replayed(what):
    router = Router()
    async with running(router) as (guard, _, outcome):
        guard.finished(CALL, what)
        assert guard.status()["queue"]["requests"] == 0
        guard.finished(CALL, prepared("visionzip"))
        await until(lambda: outcome("compared") == 1)
        assert router.asked == ["off", "custom"]


async def test_text_alone_is_compared_for_its_codec_and_says_nothing_about_a_preset():
    router = Router(differing={"turbo"})
    async with running(router) as (guard, judge, outcome):
        for _ in range(8):
            guard.finished(CALL, prepared("turbo", media=()))
        await until(lambda: outcome("compared") == 8)
        assert judge.in_force("turbo") == "turbo"


async def test_nothing_is_kept_and_nothing_runs_when_the_guard_is_off():
    router = Router()
    async with running(router, share=0.0) as (guard, _, _outcome):
        guard.finished(CALL, prepared("turbo"))
        await asyncio.sleep(0.05)
        assert guard.status()["queue"] == {"requests": 0, "bytes": 0}
        assert not router.asked
        assert guard._task is None


async def test_nothing_is_replayed_while_workers_are_busy_and_what_gets_too_old_is_dropped():
    router = Router(idle=False)
    async with running(router, queue_age_s=0.1) as (guard, _, outcome):
        guard.finished(CALL, prepared("turbo"))
        assert guard.status()["queue"] == {"requests": 1, "bytes": 100}
        await until(lambda: outcome("expired") == 1)
        assert not router.asked
        assert guard.status()["queue"] == {"requests": 0, "bytes": 0}


@pytest.mark.parametrize("by", ["a request", "other routers"])
async def test_a_replay_gives_way_and_begins_again_later(by):
    router = Router(pause_s=30.0)
    async with running(router) as (guard, _, outcome):
        guard.finished(CALL, prepared("turbo"))
        await until(lambda: router.asked)
        router.pause_s, router.idle = 0.0, False
        if by == "a request":
            guard.arrived()
        else:
            router.crowded = True
        await until(lambda: router.closed == 1)
        assert router.asked == ["off"]
        await until(lambda: guard.status()["queue"]["requests"] == 1)
        router.idle, router.crowded = True, False
        await until(lambda: outcome("compared") == 1)
        assert router.asked == ["off", "off", "turbo"]


async def test_a_failed_replay_is_counted_and_the_next_one_runs():
    router = Router(fail=True)
    async with running(router) as (guard, _, outcome):
        guard.finished(CALL, prepared("turbo"))
        await until(lambda: outcome("failed") == 1)
        router.fail = False
        guard.finished(CALL, prepared("turbo"))
        await until(lambda: outcome("compared") == 1)


async def test_neither_the_body_nor_more_than_the_bound_is_kept():
    router = Router(idle=False)
    async with running(router, queue_bytes=250) as (guard, _, outcome):
        for _ in range(3):
            guard.finished(CALL, prepared("turbo"))
        assert guard.status()["queue"] == {"requests": 2, "bytes": 200}
        assert outcome("refused") == 1
        router.idle = True
        await until(lambda: outcome("compared") == 2)
        assert all(call.options == {} and call.media == () and call.messages for call in router.calls)
