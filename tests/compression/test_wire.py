"""Which codec a cache slot crosses the wire under."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismserve.compression import loader, presets
from prismserve.compression.wire import EXACT, Slots, runs, table
from prismserve.core.errors import InvalidRequestError, UnknownMethodError
from prismserve.core.types import MediaSegment, Prompt, TextSegment

PROMPT = Prompt((TextSegment(tuple(range(5))), MediaSegment(0, bytes(32), 20, 40), TextSegment(tuple(range(10)))))
SLOTS = Slots.of(PROMPT, 35)


def wire(value):
    return presets.resolve({"wire": value}, "off").wire


def by_slot(spec, slots, start, tokens):
    """The name of the codec of every slot, written down slot by slot."""
    return [table(spec)[place].name for _, count, place in runs(spec, slots, start, tokens) for _ in range(count)]


def test_the_slots_of_a_prompt_are_its_media_after_compression():
    assert Slots(35, ((5, 25),)) == SLOTS


def test_a_codec_by_name_means_the_whole_prompt_for_int8_and_all_but_text_and_the_last_tokens_for_int4():
    assert by_slot(wire("int8"), SLOTS, 0, 35) == ["int8"] * 35
    assert by_slot(wire("none"), SLOTS, 0, 35) == ["none"] * 35
    assert by_slot(wire("int4"), SLOTS, 0, 35) == ["int8"] * 3 + ["none"] * 32


def test_images_text_and_the_residual_window_have_settings_of_their_own():
    spec = wire({"codec": "int4", "residual": 4, "text": "fp8"})
    assert by_slot(spec, SLOTS, 0, 35) == ["fp8"] * 5 + ["int4"] * 20 + ["fp8"] * 6 + ["none"] * 4
    exact_text = wire({"codec": "int8", "residual": 4, "text": "none"})
    assert by_slot(exact_text, SLOTS, 0, 35) == ["none"] * 5 + ["int8"] * 20 + ["none"] * 10
    assert [tokens for _, tokens, _ in runs(exact_text, SLOTS, 0, 35)] == [5, 20, 10]
    assert len(table(exact_text)) == 2


@given(st.integers(0, 35), st.integers(0, 35), st.integers(0, 40), st.sampled_from(["same", "none", "fp8"]))
def test_any_run_is_covered_once_in_order_and_agrees_with_the_whole(first, last, residual, text):
    spec = wire({"codec": "int4", "residual": residual, "text": text})
    start, end = sorted((first, last))
    reached = start
    for at, tokens, _ in runs(spec, SLOTS, start, end - start):
        assert at == reached
        assert tokens > 0
        reached += tokens
    assert reached == end
    assert by_slot(spec, SLOTS, start, end - start) == by_slot(spec, SLOTS, 0, 35)[start:end]


def test_specs_that_differ_in_any_setting_are_kept_apart():
    values = ["int4", {"codec": "int4", "residual": 0}, {"codec": "int4", "text": "none"}, "int8", "fp8"]
    assert len({wire(value).fingerprint() for value in values}) == len(values)
    assert wire("int4") == wire({"codec": "int4", "residual": 32, "text": "int8", "group_tokens": 64})
    assert table(wire("none")) == (EXACT,)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"codec": "int4", "text": "zip"}, "compression.wire.text"),
        ({"codec": "int4", "residual": -1}, "compression.wire.residual"),
        ({"codec": "int4", "residual": 1.5}, "compression.wire.residual"),
        ({"codec": "none", "residual": 4}, "compression.wire.residual"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(value, field):
    with pytest.raises((InvalidRequestError, UnknownMethodError)) as caught:
        wire(value)
    assert caught.value.field == field


def test_every_codec_can_be_named():
    for name in loader.names("codec"):
        assert table(wire(name))[0].name == name
