"""A preset that is really bad is found by replays on real workers, stepped back, and comes back when it is good again."""

from __future__ import annotations

import asyncio
from types import MappingProxyType

import pytest

from prismserve.compression import presets
from prismserve.compression.presets_table import Basis, Preset
from prismserve.core.types import Role
from prismserve.router.fidelity.config import FidelityConfig
from prismserve.router.fidelity.judge import Control

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "What is in the image?"
SHARE = FidelityConfig(
    share=1.0,
    samples_min=4,
    window=6,
    idle_check_s=0.01,
    recover_after_s=0.01,
    recover_share=1.0,
    turbo_disagreement_max=0.3,
)


def set_turbo(monkeypatch, visual, keep):
    own = {**presets.PRESETS[Basis.SALIENCE], "turbo": Preset(visual, keep, "none")}
    monkeypatch.setattr(presets, "PRESETS", MappingProxyType({**presets.PRESETS, Basis.SALIENCE: own}))
    presets._named.cache_clear()


@pytest.fixture(autouse=True)
def _forget_presets():
    yield
    presets._named.cache_clear()


def compared(router):
    name, labels = "prismserve:fidelity_replays_total", {"model_name": "reference", "outcome": "compared"}
    return router.metrics.registry.get_sample_value(name, labels) or 0


async def ask_until(world, condition, scenes=40):
    """Ask about one scene after another, each replayed before the next, until ``condition``."""
    for scene in range(scenes):
        before = compared(world.router)
        await world.ask(scene, QUESTION, "turbo", max_tokens=12)
        async with asyncio.timeout(20):
            while compared(world.router) == before:
                await asyncio.sleep(0.01)
        if condition():
            return
    message = f"after {scenes} scenes: {world.router.fidelity.status()}"
    raise AssertionError(message)


async def test_random_pruning_under_a_presets_name_is_stepped_back_visibly_and_reversibly(open_world, monkeypatch):
    world = open_world()
    await world.add(Role.MIXED, stats_interval_s=0.02)
    router = await world.open_router(fidelity=SHARE)
    guard = router.fidelity
    set_turbo(monkeypatch, "random", 0.06)
    await ask_until(world, lambda: guard.status()["presets"]["turbo"]["held"])
    assert router.status()["fidelity"]["presets"]["turbo"]["in_force"] == "balanced"
    assert b'fidelity_preset_held{model_name="reference",preset="turbo"} 1.0' in router.metrics.render()

    told = (await world.ask(100, QUESTION, "turbo")).usage.openai()["prismserve"]["compression"]
    assert (told["preset"], told["stepped_back_from"]) == ("balanced", "turbo")
    assert told["visual"]["method"] == "visionzip"
    explicit = {"visual": {"method": "random", "keep": 0.06}}
    told = (await world.ask(101, QUESTION, explicit)).usage.openai()["prismserve"]["compression"]
    assert told["visual"] == {"method": "random", "keep": 0.06}
    changed = {"preset": "turbo", "visual": {"keep": 0.06}}
    told = (await world.ask(102, QUESTION, changed)).usage.openai()["prismserve"]["compression"]
    assert told["visual"]["method"] == "random"
    assert "stepped_back_from" not in told

    set_turbo(monkeypatch, "visionzip", 0.5)
    await ask_until(world, lambda: not guard.status()["presets"]["turbo"]["held"])
    guard.control("turbo", Control.HOLD)
    assert (await world.ask(103, QUESTION, "turbo")).usage.compression.preset == "balanced"
    guard.control("turbo", Control.RELEASE)
    usage = (await world.ask(104, QUESTION, "turbo")).usage
    assert (usage.compression.preset, usage.preset_asked) == ("turbo", "")


async def test_replays_are_no_traffic_and_none_happen_when_the_guard_is_off(open_world):
    world = open_world()
    worker = await world.add(Role.MIXED, stats_interval_s=0.02)
    router = await world.open_router(fidelity=FidelityConfig(share=0.0))
    await world.ask(0, QUESTION, "turbo")
    await asyncio.sleep(0.3)
    assert worker.stats().encoded_images == 1
    assert b"fidelity_replays_total{" not in router.metrics.render()
    assert b'request_success_total{finished_reason="stop",model_name="reference"} 1.0' in router.metrics.render()
