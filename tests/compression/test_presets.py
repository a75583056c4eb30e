from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismserve.compression import presets
from prismserve.compression.loader import kept_tokens
from prismserve.core.errors import InvalidRequestError, UnknownMethodError


def shown(plan):
    visual, wire = dict(plan.visual.params), plan.wire.name
    return plan.preset, plan.visual.name, visual.get("keep"), wire


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        (None, "off", ("off", "none", None, "none")),
        (None, "turbo", ("turbo", "prism", 0.125, "int8")),
        ({}, "balanced", ("balanced", "visionzip", 0.25, "int8")),
        ("off", "turbo", ("off", "none", None, "none")),
        ("quality", "off", ("quality", "visionzip", 0.5, "none")),
        ("balanced", "off", ("balanced", "visionzip", 0.25, "int8")),
        ("visionzip", "off", ("custom", "visionzip", 0.25, "none")),
        ("random", "balanced", ("custom", "random", 0.25, "int8")),
        ({"preset": "turbo"}, "off", ("turbo", "prism", 0.125, "int8")),
        ({"preset": "turbo", "wire": "none"}, "off", ("custom", "prism", 0.125, "none")),
        ({"preset": "turbo", "wire": None, "visual": None}, "off", ("turbo", "prism", 0.125, "int8")),
        ({"preset": "off", "visual": {"method": "visionzip", "keep": 64}}, "turbo", ("custom", "visionzip", 64, "none")),
        ({"visual": {"method": "visionzip", "keep": 64}, "wire": {"codec": "int8"}}, "off",
         ("custom", "visionzip", 64, "int8")),
        ({"visual": {"keep": 0.5}}, "balanced", ("custom", "visionzip", 0.5, "int8")),
        ({"visual": "uniform", "wire": {"group_tokens": 64}}, "balanced", ("custom", "uniform", 0.25, "int8")),
        ({"visual": {"method": "none"}, "wire": {"codec": "none"}}, "off", ("off", "none", None, "none")),
        ({"visual": {}}, "off", ("off", "none", None, "none")),
    ],
)  # fmt: skip
def test_what_is_left_out_comes_from_the_preset_or_the_default(value, default, expected):
    assert shown(presets.resolve(value, default)) == expected


@pytest.mark.parametrize(
    ("value", "error", "field", "says"),
    [
        ("nope", UnknownMethodError, "compression", "presets: off, quality, balanced, turbo; visual methods: cdpruner, "),
        ("int8", UnknownMethodError, "compression", "unknown compression 'int8'"),
        ("", UnknownMethodError, "compression", "presets"),
        ("OFF", UnknownMethodError, "compression", "presets"),
        ("x" * 65, InvalidRequestError, "compression", "65 characters, at most 64"),
        (3, InvalidRequestError, "compression", "a number"),
        (True, InvalidRequestError, "compression", "a boolean"),
        ([], InvalidRequestError, "compression", "a list"),
        ({"presett": "off"}, InvalidRequestError, "compression.presett", "available: preset, visual, prefill, wire"),
        ({1: "off"}, InvalidRequestError, "compression", "keys are strings"),
        ({"preset": 1}, InvalidRequestError, "compression.preset", "a number"),
        ({"preset": "visionzip"}, UnknownMethodError, "compression.preset", "available: off, quality, balanced, turbo"),
        ({"visual": 5}, InvalidRequestError, "compression.visual", "a number"),
        ({"visual": [1]}, InvalidRequestError, "compression.visual", "a list"),
        ({"visual": "nope"}, UnknownMethodError, "compression.visual.method", "cdpruner, chatunivi, cls_topk, "),
        ({"visual": "../base"}, UnknownMethodError, "compression.visual.method", "available"),
        ({"visual": {"method": "_budget"}}, UnknownMethodError, "compression.visual.method", "available"),
        ({"visual": {"method": False}}, InvalidRequestError, "compression.visual.method", "a boolean"),
        ({"visual": {"keep": 5}}, InvalidRequestError, "compression.visual.keep", "name another"),
        ({"visual": {"method": "none", "keep": 5}}, InvalidRequestError, "compression.visual.keep", "name another"),
        ({"visual": {"method": "random", "merge": "sum"}}, InvalidRequestError, "compression.visual.merge",
         "available: method, keep"),
        ({"visual": {"method": "random", "version": 1}}, InvalidRequestError, "compression.visual.version", "no key"),
        ({"visual": {"method": "random", "keep": True}}, InvalidRequestError, "compression.visual.keep", "count"),
        ({"visual": {"method": "random", "keep": "64"}}, InvalidRequestError, "compression.visual.keep", "count"),
        ({"visual": {"method": "random", "keep": 0}}, InvalidRequestError, "compression.visual.keep", "count"),
        ({"visual": {"method": "random", "keep": -3}}, InvalidRequestError, "compression.visual.keep", "count"),
        ({"visual": {"method": "random", "keep": 1.5}}, InvalidRequestError, "compression.visual.keep", "share"),
        ({"visual": {"method": "random", "keep": float("nan")}}, InvalidRequestError, "compression.visual.keep",
         "finite"),
        ({"visual": {"method": "random", "keep": 1e999}}, InvalidRequestError, "compression.visual.keep", "finite"),
        ({"visual": {"method": "random", "keep": 2**63}}, InvalidRequestError, "compression.visual.keep", "2^53"),
        ({"visual": {"method": "random", "keep": {"a": {}}}}, InvalidRequestError, "compression.visual.keep",
         "an object"),
        ({"visual": {"method": "visionzip", "merge": "y" * 65}}, InvalidRequestError, "compression.visual.merge",
         "at most 64"),
        ({"wire": "nope"}, UnknownMethodError, "compression.wire.codec", "available: fp8, int4, int8, none"),
        ({"wire": {"codec": "int8", "group_tokens": True}}, InvalidRequestError, "compression.wire.group_tokens",
         "integer"),
        ({"wire": {"codec": "int8", "group_tokens": 1}}, InvalidRequestError, "compression.wire.group_tokens", "32"),
        ({"wire": {"codec": "none", "bits": 8}}, InvalidRequestError, "compression.wire.bits", "no key"),
        ({"visual": {str(i): i for i in range(17)}}, InvalidRequestError, "compression.visual", "at most 16"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_with_field_and_reason(value, error, field, says):
    with pytest.raises(error) as caught:
        presets.resolve(value, "off")
    assert caught.value.field == field
    assert says in str(caught.value)
    assert len(str(caught.value)) < 600


def test_only_off_is_exact():
    assert [name for name in presets.names() if presets.resolve(name, "off").exact] == ["off"]


def test_equal_requests_have_equal_fingerprints_and_different_ones_do_not():
    a = presets.resolve({"visual": {"keep": 0.25, "method": "visionzip"}}, "off")
    b = presets.resolve("visionzip", "off")
    c = presets.resolve({"visual": {"keep": 0.5, "method": "visionzip"}}, "off")
    assert a.visual.fingerprint() == b.visual.fingerprint() != c.visual.fingerprint()


def test_a_count_of_one_and_a_share_of_one_differ():
    one = presets.resolve({"visual": {"method": "random", "keep": 1}}, "off")
    every = presets.resolve({"visual": {"method": "random", "keep": 1.0}}, "off")
    assert one.visual != every.visual
    assert one.visual.fingerprint() != every.visual.fingerprint()
    assert (kept_tokens(one.visual, 196), kept_tokens(every.visual, 196)) == (1, 196)


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_survives_json(name):
    plan = presets.resolve(name, "off")
    assert json.loads(json.dumps(dict(plan.visual.params))) == dict(plan.visual.params)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
plans = st.dictionaries(
    st.sampled_from(["preset", "visual", "wire", "x"]),
    st.dictionaries(
        st.sampled_from(["method", "codec", "keep", "merge", "contextual", "group_tokens"]),
        json_values | st.sampled_from(["visionzip", "random", "int8", "none", "sum"]),
        max_size=4,
    )
    | json_values
    | st.sampled_from(["off", "turbo", "visionzip", "int8"]),
)


@settings(max_examples=300, deadline=None)
@given(value=json_values | plans)
def test_any_json_gives_a_plan_or_a_request_error(value):
    field = presets.FIELD
    try:
        plan = presets.resolve(value, "balanced")
    except InvalidRequestError as error:
        field = error.field
    else:
        assert plan.visual.fingerprint()
        assert plan.wire.fingerprint()
    assert field.split(".")[0] == presets.FIELD


@pytest.mark.parametrize(
    ("value", "default", "preset"),
    [
        (None, "turbo", "turbo"),
        (None, "visionzip", None),
        ("balanced", "off", "balanced"),
        ("visionzip", "turbo", None),
        ({"preset": "turbo"}, "off", "turbo"),
        ({"preset": "turbo", "visual": None}, "off", "turbo"),
        ({}, "quality", "quality"),
        ({"preset": "turbo", "visual": {"keep": 0.125}}, "off", None),
        ({"visual": "visionzip"}, "turbo", None),
        ({"wire": "int8"}, "turbo", None),
    ],
)
def test_a_preset_is_asked_for_only_where_nothing_of_it_is_said_otherwise(value, default, preset):
    presets.resolve(value, default)
    assert presets.asked(value, default) == preset
