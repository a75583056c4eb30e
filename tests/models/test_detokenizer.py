from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismserve.models.processing import IncrementalDetokenizer, Processor
from prismserve.models.reference import reference_path


@pytest.fixture(scope="module")
def processor():
    return Processor.from_directory(reference_path())


def pieces(processor, ids, step=1):
    detokenizer = IncrementalDetokenizer(processor)
    out = [detokenizer.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    return [*out, detokenizer.flush()]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40), step=st.integers(1, 5))
def test_pieces_join_to_the_text(processor, text, step):
    ids = processor.encode_text(text)
    assert "".join(pieces(processor, ids, step)) == processor.decode(ids)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="aé漢😀🇫🇷 \n", max_size=30))
def test_no_piece_holds_part_of_a_character(processor, text):
    assert not any("\ufffd" in piece for piece in pieces(processor, processor.encode_text(text)))


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 767), max_size=60))
def test_any_ids_give_what_decoding_them_together_gives_where_they_are_text(processor, ids):
    whole = processor.decode(ids)
    if "\ufffd" not in whole:
        assert "".join(pieces(processor, ids)) == whole


def test_text_arrives_as_soon_as_it_is_certain(processor):
    ids = processor.encode_text("a red circle")
    assert all(pieces(processor, ids)[: len(ids)])


def test_bytes_that_are_no_text_do_not_wait_forever(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(["ð"] * 40)
    detokenizer = IncrementalDetokenizer(processor)
    assert detokenizer.push(ids).count("\ufffd") >= 32
    detokenizer.flush()
    assert detokenizer.flush() == ""


def test_half_a_character_comes_with_flush_as_a_replacement(processor):
    detokenizer = IncrementalDetokenizer(processor)
    first, *_ = processor.encode_text("😀")
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_long_runs_without_text_keep_a_short_window(processor):
    detokenizer = IncrementalDetokenizer(processor)
    assert detokenizer.push([0] * 500) == ""
    assert len(detokenizer._ids) < 40
    assert detokenizer.push(processor.encode_text("red")) == "red"
