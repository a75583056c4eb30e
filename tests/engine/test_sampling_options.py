"""Sampling options in a running engine with the reference model."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch

from prismserve.core.errors import EngineError, InvalidRequestError
from prismserve.core.types import Constraint, ConstraintKind, FinishReason, TextSegment
from tests.engine.conftest import tokens_of

WAIT_S = 30
COLOURS = ["red", "green", "blue"]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": COLOURS}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
JSON = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA))
REGEX = Constraint(ConstraintKind.REGEX, r"[a-z]{3,8}( [a-z]{2,6}){2,4}")


def submit(engine, request, worker="local", **extra) -> None:
    constraint = request.sampling.constraint
    matcher = None if constraint is None else engine.constraints.compile(constraint).result(WAIT_S)
    engine.submit(request, worker=worker, matcher=matcher, **extra)


def outputs_of(workshop, engine, requests) -> dict:
    for request in requests:
        submit(engine, request)
    return workshop.drive(engine)


def text_of(workshop, outputs) -> str:
    return workshop.processor.decode([token for output in outputs for token in output.token_ids])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_schema_is_kept_at_any_temperature(workshop, temperature) -> None:
    sampling = {"constraint": JSON, "temperature": temperature, "max_tokens": 200}
    requests = [workshop.request(f"r{seed}", "Describe the image.", (0,), seed=seed, **sampling) for seed in range(6)]
    for outputs in outputs_of(workshop, workshop.engine(), requests).values():
        value = json.loads(text_of(workshop, outputs))
        assert list(value) == ["colour", "count"]
        assert value["colour"] in COLOURS
        assert 0 <= value["count"] <= 99
        assert outputs[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_tokens": 150}, {"logit_bias": ((2, 100.0),)}])
def test_a_complete_answer_ends_and_an_incomplete_one_does_not_whatever_is_asked(workshop, options) -> None:
    request = workshop.request("a", "x", constraint=JSON, max_tokens=200, **options)
    (outputs,) = outputs_of(workshop, workshop.engine(), [request]).values()
    assert json.loads(text_of(workshop, outputs))
    assert outputs[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_tokens": 20}])
def test_an_answer_that_could_end_goes_on_when_its_end_is_not_wanted(workshop, options) -> None:
    constraint = Constraint(ConstraintKind.REGEX, "[0-9]+")
    request = workshop.request("a", "x", constraint=constraint, max_tokens=24, logit_bias=((2, 100.0),), **options)
    (outputs,) = outputs_of(workshop, workshop.engine(), [request]).values()
    assert re.fullmatch("[0-9]{20,24}", text_of(workshop, outputs))


def test_constrained_free_greedy_and_sampled_rows_do_not_disturb_each_other(workshop) -> None:
    kinds = [
        {},
        {"constraint": JSON},
        {"constraint": REGEX, "temperature": 1.0, "seed": 3},
        {"temperature": 1.2, "seed": 5, "top_p": 0.9, "logprobs": 2},
        {"logit_bias": ((30, 7.5), (31, -100.0)), "frequency_penalty": 0.5},
        {"constraint": REGEX, "repetition_penalty": 1.2, "temperature": 0.7, "seed": 9, "top_k": 20},
    ]
    requests = [
        workshop.request(f"r{number}", "What do you see?", (number % 2,), max_tokens=40, **options)
        for number, options in enumerate(kinds)
    ]
    alone = {}
    for request in requests:
        alone |= tokens_of(outputs_of(workshop, workshop.engine(), [request]))
    together = tokens_of(outputs_of(workshop, workshop.engine(max_step_tokens=37), requests))
    assert together == alone


def test_preemption_keeps_the_place_in_the_constraint(workshop) -> None:
    words = Constraint(ConstraintKind.REGEX, "([a-z]{3,5} ){12,16}")
    requests = [
        workshop.request(f"r{number}", "x y z", constraint=words, temperature=1.0, seed=number, max_tokens=60)
        for number in range(4)
    ]
    roomy = tokens_of(outputs_of(workshop, workshop.engine(), requests))
    tight = workshop.engine(blocks=24, block_tokens=4, max_model_len=96, prefix_caching=False)
    assert tokens_of(outputs_of(workshop, tight, requests)) == roomy
    assert tight.stats().preemptions > 0


@pytest.mark.parametrize("constraint", [JSON, REGEX])
def test_a_migrated_request_goes_on_where_it_was(workshop, constraint) -> None:
    request = workshop.request("a", "Describe it.", constraint=constraint, temperature=1.0, seed=4, logprobs=1)
    request = replace(request, sampling=replace(request.sampling, max_tokens=60))
    (outputs,) = outputs_of(workshop, workshop.engine(), [request]).values()
    tokens = [token for output in outputs for token in output.token_ids]
    logprobs = [entry.logprob for output in outputs for entry in output.logprobs]
    for cut in (1, 2, len(tokens) // 2, len(tokens) - 1):
        resumed = replace(request, attempt=1, resume_token_ids=tuple(tokens[:cut]))
        (rest,) = outputs_of(workshop, workshop.engine(), [resumed]).values()
        assert [token for output in rest for token in output.token_ids] == tokens[cut:]
        found = [entry.logprob for output in rest for entry in output.logprobs]
        assert torch.allclose(torch.tensor(found), torch.tensor(logprobs[cut:]), atol=1e-4)


def test_a_request_resumed_behind_its_complete_answer_just_ends(workshop) -> None:
    ids = workshop.processor.encode_text('{"colour":"red","count":1}')
    request = workshop.request("a", "x", constraint=JSON, ignore_eos=True, max_tokens=100)
    request = replace(request, attempt=1, resume_token_ids=tuple(ids))
    (outputs,) = outputs_of(workshop, workshop.engine(), [request]).values()
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert {token for output in outputs for token in output.token_ids} <= workshop.processor.eos_token_ids


def test_resumed_tokens_that_break_the_constraint_are_refused_and_leave_nothing_behind(workshop) -> None:
    engine = workshop.engine()
    request = workshop.request("a", "x", constraint=JSON)
    with pytest.raises(InvalidRequestError, match="do not fit"):
        submit(engine, replace(request, resume_token_ids=tuple(workshop.processor.encode_text("red"))))
    assert not engine.has_work
    engine.check_integrity()


def test_logprobs_are_the_models_own_and_do_not_change_the_answer(workshop) -> None:
    plain = workshop.request("plain", "What is left?", (0,), max_tokens=8)
    asking = workshop.request("asking", "What is left?", (0,), max_tokens=8, logprobs=3)
    steered = workshop.request("steered", "What is left?", (0,), max_tokens=8, logprobs=3, logit_bias=((300, 50.0),))
    outputs = outputs_of(workshop, workshop.engine(), [plain, asking, steered])
    tokens = tokens_of(outputs)
    assert tokens["plain"] == tokens["asking"]
    assert not any(output.logprobs for output in outputs["plain"])
    entries = [entry for output in outputs["asking"] for entry in output.logprobs]
    assert len(entries) == len(tokens["asking"])
    for token, entry in zip(tokens["asking"], entries, strict=True):
        assert entry.top[0] == (token, entry.logprob)  # greedy takes the best
        assert len(entry.top) == 3
        assert sum(math.exp(value) for _, value in entry.top) <= 1.0001
    first = outputs["steered"][0].logprobs[0]
    assert outputs["steered"][0].token_ids == (300,)
    assert [token for token, _ in first.top] == [token for token, _ in entries[0].top]
    assert first.logprob < first.top[0][1]


def test_bias_bans_and_forces_tokens(workshop) -> None:
    engine = workshop.engine()
    free = tokens_of(outputs_of(workshop, engine, [workshop.request("a", "x", max_tokens=1)]))["a"][0]
    banned = workshop.request("b", "x", max_tokens=6, ignore_eos=True, logit_bias=((free, -100.0),))
    assert free not in tokens_of(outputs_of(workshop, engine, [banned]))["b"]
    forced = workshop.request("c", "x", max_tokens=3, temperature=1.0, logit_bias=((77, 100.0),))
    assert tokens_of(outputs_of(workshop, engine, [forced]))["c"] == [77, 77, 77]
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        submit(engine, workshop.request("d", "x", logit_bias=((768, 1.0),)))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"constraint": JSON}, {"logprobs": 2}])
def test_nan_logits_end_their_own_request_alone(workshop, options, monkeypatch) -> None:
    requests = [workshop.request(f"r{number}", "good morning", max_tokens=6) for number in range(3)]
    expected = tokens_of(outputs_of(workshop, workshop.engine(), requests))
    engine = workshop.engine()
    compute = engine._stepper._runner.run
    broken = replace(workshop.request("r1", "good morning", max_tokens=6, **options), request_id="broken")

    def run(items, layer_done):
        logits = compute(items, layer_done)
        names = [item.sequence.request.request_id for item in items if item.samples]
        if "broken" in names:
            logits[names.index("broken"), 500] = math.nan
        return logits

    monkeypatch.setattr(engine._stepper._runner, "run", run)
    outputs = outputs_of(workshop, engine, [requests[0], broken, requests[2]])
    assert [(o.token_ids, o.finish_reason) for o in outputs["broken"]] == [((), FinishReason.ERROR)]
    assert "not finite" in outputs.pop("broken")[0].error
    assert tokens_of(outputs) == {name: expected[name] for name in ("r0", "r2")}
    assert engine.stats().kv_blocks_used == 0


def test_a_constraint_that_becomes_too_complex_ends_its_own_request_alone(workshop, monkeypatch) -> None:
    engine = workshop.engine()
    bound = workshop.request("bound", "x", constraint=REGEX, max_tokens=20)
    matcher = engine.constraints.compile(REGEX).result(WAIT_S)
    engine.submit(bound, worker="local", matcher=matcher)
    engine.submit(workshop.request("free", "x", max_tokens=5, ignore_eos=True), worker="local")
    first = engine.step()
    matcher.accept(workshop.processor.encode_text("{"))  # as if the library had given up
    outputs = {output.request_id: output for output in engine.step()}
    assert {output.request_id for output in first} == {"bound", "free"}
    assert outputs["bound"].finish_reason is FinishReason.ERROR
    assert outputs["bound"].error.startswith("invalid: the constraint lets no token follow")
    assert outputs["free"].token_ids
    engine.check_integrity()


def test_the_first_token_of_an_import_carries_its_logprobs_and_advances_the_constraint(workshop) -> None:
    request = workshop.request("a", "Describe it.", constraint=REGEX, logprobs=1, temperature=1.0, max_tokens=40)
    (whole,) = outputs_of(workshop, workshop.engine(), [request]).values()
    target, source = workshop.engine(), workshop.engine()
    views = []

    class Sink:
        def layer_ready(self, layer, start_token, tokens):
            pass

    submit(source, request, "prefill", sink_factory=lambda view: views.append(view) or Sink())
    (first,) = (output for outputs in workshop.drive(source).values() for output in outputs)
    assert (first.token_ids, first.logprobs) == (whole[0].token_ids, whole[0].logprobs)
    ticket = target.begin_import(request, target.constraints.compile(REGEX).result(WAIT_S))
    write = target.import_writer(ticket)
    for layer in range(source.layout.layers):
        write(layer, 0, *source.pool.read(layer, views[0].table, 0, views[0].prompt_tokens))
    with pytest.raises(EngineError, match="log-probabilities"):
        target.finish_import(ticket, request, first.token_ids, views[0].next_position, None)
    target.finish_import(ticket, request, first.token_ids, views[0].next_position, None, first.logprobs)
    (rest,) = workshop.drive(target).values()
    assert rest[0].logprobs == first.logprobs
    assert [o.token_ids for o in rest] == [o.token_ids for o in whole]


def test_random_mixes_with_cancellations_leave_nothing_in_use(workshop) -> None:
    engine, chance = workshop.engine(blocks=40, block_tokens=8, max_model_len=128, max_running=6), random.Random(1)
    options = [{}, {"constraint": JSON}, {"constraint": REGEX, "temperature": 1.0}, {"logprobs": 2, "temperature": 1.0}]
    for number in range(60):
        request = workshop.request(f"r{number}", "x " * chance.randrange(1, 9), max_tokens=12, **chance.choice(options))
        assert isinstance(request.prompt.segments[0], TextSegment)
        submit(engine, request, chance.choice(["local", "local", "prefill"]))
        for output in engine.step():
            if chance.random() < 0.3:
                engine.cancel(output.request_id, 0)
            engine.release_export(output.request_id, 0)
        engine.check_integrity()
    for _ in range(500):
        for output in engine.step():
            engine.release_export(output.request_id, 0)
    engine.check_integrity()
    assert not engine.has_work
    assert engine.stats().kv_blocks_used == 0
