"""Visual tokens that leave between layers: the same survivors and the same answer however the work was cut and mixed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from prismserve.compression import loader, presets
from prismserve.compression.base import Share
from prismserve.core.errors import EngineError, InvalidRequestError
from prismserve.core.types import MediaSegment, Request
from prismserve.engine.taps import Taps
from tests.engine.conftest import Workshop, tokens_of

METHODS = tuple(name for name in loader.names("prefill") if name != "none")
IDENTITY = {"framefusion": {"cost": 1.0}, "sttm": {"spatial": 1.1, "temporal": 1.1}, "asap": {"keep": 1.0, "blend": 0.0}}
SMALL = {"framefusion": {"cost": 0.4}, "sttm": {"spatial": 0.9}}
LAYERS = 6


def plan(name: str, **params: Any) -> Any:
    return presets.resolve({"prefill": {"method": name, **params}}, "off")


def small(name: str) -> Any:
    return plan(name, **SMALL.get(name, {"keep": 0.2}))


def ask(workshop: Workshop, name: str, question: int, scene: int, compression: Any, **sampling: Any) -> Request:
    text = workshop.questions(scene)[question]
    return workshop.request(name, text, (scene,), visual=compression, **{"ignore_eos": True, **sampling})


def reports(outputs: Any) -> dict[str, Any]:
    return {name: next(item.report for item in items if item.report) for name, items in outputs.items()}


@pytest.mark.parametrize("name", METHODS)
def test_keeping_all_answers_as_without_the_method(workshop, name) -> None:
    requests = [ask(workshop, f"r{i}", i, 3, plan(name, **IDENTITY.get(name, {"keep": 1.0}))) for i in range(3)]
    off = [dataclasses.replace(r, compression=presets.resolve("off", "off")) for r in requests]
    assert workshop.answers(workshop.engine(), requests) == workshop.answers(workshop.engine(), off)


@pytest.mark.parametrize("name", METHODS)
def test_no_size_of_chunks_and_no_mixture_of_requests_changes_an_answer(workshop, name) -> None:
    requests = [ask(workshop, f"r{i}", i, 4, small(name)) for i in range(2)]
    expected = {}
    for request in requests:
        expected |= workshop.answers(workshop.engine(max_step_tokens=512), [request])
    others = [ask(workshop, "off", 0, 5, presets.resolve("off", "off")), ask(workshop, "fastv", 1, 4, small("fastv"))]
    for step_tokens in (13, 64, 200):
        engine = workshop.engine(max_step_tokens=step_tokens)
        got = workshop.answers(engine, [others[0], *requests, others[1]])
        assert {name: got[name] for name in expected} == expected
        assert engine.pool.used_groups == 0
        assert len(engine.pool.slab) == 0


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "framefusion"])
def test_preemption_chooses_the_same_survivors(workshop, name, preemption) -> None:
    requests = [ask(workshop, f"r{i}", i, 6, small(name), max_tokens=40) for i in range(3)]
    expected = {}
    for request in requests:
        expected |= workshop.answers(workshop.engine(), [request], check=False)
    engine = workshop.engine(
        blocks=24, max_model_len=300, max_step_tokens=64, preemption=preemption, swap_bytes=16 << 20
    )
    assert workshop.answers(engine, requests) == expected
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "asap"])
def test_a_request_that_goes_on_elsewhere_is_pruned_as_it_was(workshop, name) -> None:
    request = ask(workshop, "a", 0, 7, small(name), max_tokens=14)
    whole = workshop.answers(workshop.engine(), [request])["a"]
    resumed = dataclasses.replace(request, attempt=1, resume_token_ids=tuple(whole[:5]))
    engine = workshop.engine(max_step_tokens=50)
    assert workshop.answers(engine, [resumed])["a"] == whole[5:]


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sttm"])
def test_an_export_carries_ragged_layers_into_an_import(workshop, name) -> None:
    request = ask(workshop, "a", 1, 8, small(name))
    expected = workshop.answers(workshop.engine(), [request])["a"]
    source, target = workshop.engine(max_step_tokens=60), workshop.engine()
    source.submit(request, worker="prefill")
    first = tokens_of({}) or [t for outputs in iter(source.step, None) for o in outputs for t in o.token_ids][:0]
    assert first == []
