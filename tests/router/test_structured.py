from __future__ import annotations

import json

import pytest

from prismserve.core.errors import InvalidRequestError
from prismserve.core.types import Constraint, ConstraintKind
from prismserve.router.config import RouterConfig
from prismserve.router.structured import read_constraint

SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))


def read(**body):
    return read_constraint(body, RouterConfig())


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None, "json_object": False}},
        {"guided_json": SCHEMA},
        {"guided_json": TEXT},
    ],
)
def test_a_schema_is_the_same_however_it_is_given_and_keeps_its_order(body):
    assert read(**body) == Constraint(ConstraintKind.JSON_SCHEMA, TEXT)


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
        {"guided_json_object": True},
    ],
)
def test_any_object(body):
    assert read(**body) == Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')


def test_other_kinds():
    assert read(guided_regex="a+") == read(structured_outputs={"regex": "a+"}) == Constraint(ConstraintKind.REGEX, "a+")
    assert read(guided_choice=["é", "b"]) == Constraint(ConstraintKind.CHOICE, '["é","b"]')
    assert read(guided_grammar='root ::= "a"').kind is ConstraintKind.GRAMMAR


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}, {"response_format": None}])
def test_a_free_answer_has_none(body):
    assert read(**body) is None


def test_white_space_of_json_can_be_chosen():
    tight = read(structured_outputs={"json": SCHEMA, "disable_any_whitespace": True})
    assert json.loads(tight.text)["x-guidance"]["whitespace_flexible"] is False
    spaced = read(guided_json=SCHEMA, guided_whitespace_pattern=" ?")
    assert json.loads(spaced.text)["x-guidance"] == {"whitespace_pattern": " ?"}


def test_two_constraints_are_refused_and_both_are_named():
    with pytest.raises(InvalidRequestError) as caught:
        read(response_format={"type": "json_object"}, guided_regex="a")
    assert caught.value.field == "guided_regex"
    assert "response_format" in caught.value.message
