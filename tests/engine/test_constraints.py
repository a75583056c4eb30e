from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch

from prismserve.core.errors import EngineError, InvalidRequestError, OverloadedError
from prismserve.core.types import Constraint, ConstraintKind
from prismserve.engine import constraints
from prismserve.engine.config import EngineConfig
from prismserve.engine.constraints import ConstraintCompiler, allowed_tokens, checked_matcher

WAIT_S = 30
CPU = torch.device("cpu")


def schema(**keywords) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(keywords))


def regex(text: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, text)


def choice(*texts: str) -> Constraint:
    return Constraint(ConstraintKind.CHOICE, json.dumps(texts))


@pytest.fixture
def compiler(workshop):
    made = compiler_of(workshop)
    yield made
    made.close()


def compiler_of(workshop, **config) -> ConstraintCompiler:
    processor = workshop.processor
    return ConstraintCompiler(processor, processor.vocab_size, processor.eos_token_ids, EngineConfig(**config))


def next_tokens(workshop, matcher) -> set[str]:
    (row,) = allowed_tokens([matcher], workshop.processor.vocab_size, CPU)
    return {workshop.processor.decode([token], skip_special_tokens=False) for token in row.nonzero()[:, 0].tolist()}


@pytest.mark.parametrize(
    ("constraint", "fits", "does_not"),
    [
        (schema(type="object", properties={"a": {"type": "integer"}}, required=["a"]), '{"a": 1}', '{"b"'),
        (regex("[0-9]{2}-[a-f]+"), "12-fade", "1a"),
        (choice('say "hi"', "Ümlaut"), 'say "hi"', "say hi"),
        (Constraint(ConstraintKind.GRAMMAR, 'start: "yes" | NUMBER\nNUMBER: /[0-9]+/'), "yes", "no"),
        (Constraint(ConstraintKind.GRAMMAR, 'root ::= "SELECT " ("a" | "b")'), "SELECT b", "SELECT c"),
    ],
)
def test_every_kind_accepts_what_fits_and_refuses_what_does_not(workshop, compiler, constraint, fits, does_not) -> None:
    good, bad = (compiler.compile(constraint).result(WAIT_S) for _ in range(2))
    assert good.accept(workshop.processor.encode_text(fits))
    assert not good.error
    assert not bad.accept(workshop.processor.encode_text(does_not))
    assert bad.error
    assert not bad.done


def test_allowed_tokens_are_those_that_can_go_on_and_the_end_where_it_may_end(workshop, compiler) -> None:
    matcher = compiler.compile(regex("(red|blue)[0-9]*")).result(WAIT_S)
    assert next_tokens(workshop, matcher) == {"r", "re", "red", "b", "blue"}
    matcher.accept(workshop.processor.encode_text("red"))
    assert next_tokens(workshop, matcher) == {*"0123456789", "<|end|>"}
    assert not matcher.done
    matcher.accept(sorted(workshop.processor.eos_token_ids))
    assert matcher.done


def test_an_answer_to_which_nothing_can_be_added_is_done(workshop, compiler) -> None:
    matcher = compiler.compile(choice("red", "blue")).result(WAIT_S)
    matcher.accept(workshop.processor.encode_text("red"))
    assert matcher.done


def test_masks_of_a_batch_are_those_of_each_alone(workshop, compiler) -> None:
    matchers = [
        compiler.compile(item).result(WAIT_S) for item in (regex("[a-f]+"), choice("red"), schema(type="array"))
    ]
    vocabulary = workshop.processor.vocab_size
    together = allowed_tokens(matchers, vocabulary, CPU)
    assert together.shape == (3, vocabulary)
    for row, matcher in zip(together, matchers, strict=True):
        assert torch.equal(row, allowed_tokens([matcher], vocabulary, CPU)[0])


def test_matchers_of_one_constraint_do_not_disturb_each_other(workshop, compiler) -> None:
    first, second = (compiler.compile(choice("red", "blue")).result(WAIT_S) for _ in range(2))
    first.accept(workshop.processor.encode_text("red"))
    assert first.done
    assert "blue" in next_tokens(workshop, second)


def test_white_space_in_json_ends(workshop, compiler) -> None:
    matcher = compiler.compile(schema(type="object")).result(WAIT_S)
    assert matcher.accept(workshop.processor.encode_text("{" + " " * 20))
    assert " " not in next_tokens(workshop, matcher)
    tight = {"whitespace_flexible": False, "whitespace_pattern": None}
    matcher = compiler.compile(schema(type="object", **{"x-guidance": tight})).result(WAIT_S)
    matcher.accept(workshop.processor.encode_text("{"))
    assert next_tokens(workshop, matcher) == {'"', "}"}


BOMBS = {
    "a nesting of alternatives": schema(
        **{"$ref": "#/$defs/d0"},
        **{
            "$defs": {
                **{f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 8} for i in range(60)},
                "d60": {"type": "integer", "multipleOf": 99_999_999, "minimum": 3, "maximum": 10**18},
            }
        },
    ),
    "a heavy number": schema(type="integer", multipleOf=99_999_999, minimum=3, maximum=10**18),
    "a reference to itself": schema(**{"$ref": "#"}),
    "a file": schema(**{"$ref": "file:///etc/passwd"}),
    "an address": schema(**{"$ref": "http://127.0.0.1:9/schema.json"}),
    "no text at all": regex(r"[^\s\S]"),
    "an unknown type": schema(type="wizard"),
    "no schema": Constraint(ConstraintKind.JSON_SCHEMA, "{"),
    "no regex": regex("(a"),
    "no grammar": Constraint(ConstraintKind.GRAMMAR, "start: missing"),
    "a strange grammar": Constraint(ConstraintKind.GRAMMAR, "root ::= ((((("),
    "no choices": Constraint(ConstraintKind.CHOICE, "[]"),
    "nothing fits": schema(type="string", minLength=5, maxLength=3),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_or_a_mistake_ends_in_an_error_of_one_line_and_in_time(compiler, name) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compiler.compile(BOMBS[name]).result(WAIT_S)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300
    with pytest.raises(InvalidRequestError):  # remembered, not computed again
        compiler.compile(BOMBS[name]).result(0.5)


def test_a_constraint_over_the_size_limit_is_refused_at_once(workshop) -> None:
    compiler = compiler_of(workshop, constraint_max_bytes=10)
    with pytest.raises(InvalidRequestError, match="at most 10"):
        compiler.compile(regex("a" * 11))


def test_equal_constraints_are_compiled_once_and_the_oldest_are_forgotten(workshop, monkeypatch) -> None:
    compiler, built = compiler_of(workshop, constraint_cache_entries=2), []
    build = compiler._build
    monkeypatch.setattr(compiler, "_build", lambda item: built.append(item) or build(item))
    for text in ("a", "b", "a", "c", "a", "b"):
        compiler.compile(regex(text)).result(WAIT_S)
    assert [item.text for item in built] == ["a", "b", "c", "b"]


def test_waiting_for_compilations_is_bounded_and_a_waiter_that_leaves_disturbs_no_other(workshop, monkeypatch) -> None:
    compiler, gate = compiler_of(workshop), threading.Event()
    build = compiler._build
    monkeypatch.setattr(compiler, "_build", lambda item: gate.wait(WAIT_S) and build(item))
    monkeypatch.setattr(constraints, "_PENDING_MAX", 3)
    first, same, *_ = [compiler.compile(regex(text)) for text in ("a", "a", "b", "c")]
    with pytest.raises(OverloadedError):
        compiler.compile(regex("d"))
    assert not first.cancel()
    gate.set()
    assert same.result(WAIT_S).accept([]) is True
    compiler.compile(regex("d")).result(WAIT_S)


def test_resumed_tokens_advance_a_matcher_once(workshop, compiler) -> None:
    constraint = choice("red circle", "blue")
    ids = workshop.processor.encode_text("red circle")
    matcher = compiler.compile(constraint).result(WAIT_S)
    for _ in range(2):  # an import that found no room is tried again
        assert checked_matcher(constraint, matcher, ids[:1]) is matcher
    assert matcher.accepted == 1
    assert matcher.accept(ids[1:])
    assert matcher.done
    with pytest.raises(InvalidRequestError, match="do not fit"):
        checked_matcher(constraint, compiler.compile(constraint).result(WAIT_S), ids[1:])


def test_the_engine_takes_a_constrained_request_only_with_its_matcher(workshop, compiler) -> None:
    engine = workshop.engine()
    request = workshop.request("a", "x")
    bound = replace(request, sampling=replace(request.sampling, constraint=regex("a")))
    matcher = compiler.compile(regex("a")).result(WAIT_S)
    with pytest.raises(EngineError, match="compile"):
        engine.submit(bound, worker="local")
    with pytest.raises(EngineError, match="compile"):
        engine.submit(request, worker="local", matcher=matcher)
    assert not engine.has_work
