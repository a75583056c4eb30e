from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismserve.compression import loader
from prismserve.compression.wire import Slots, runs, table
from prismserve.core.types import KVLayout
from prismserve.kv_transfer.plan import aligned, cut, encoded_bytes, reserve_bytes

LAYOUT = KVLayout("bfloat16", layers=2, kv_heads=2, head_dim=24, block_tokens=16)


@pytest.mark.parametrize("codec", loader.names("codec"))
@given(chunks=st.lists(st.integers(1, 700), min_size=1, max_size=12))
def test_the_reservation_holds_the_prompt_however_it_is_cut(codec, chunks):
    spec = loader.normalise(loader.codec(codec), {}, "compression.wire")
    used = LAYOUT.layers * sum(aligned(encoded_bytes(tokens, spec, LAYOUT)) for tokens in chunks)
    assert used <= reserve_bytes(sum(chunks), spec, LAYOUT)


@given(
    chunks=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    image=st.tuples(st.integers(0, 400), st.integers(0, 600)),
    cached=st.integers(0, 200),
    residual=st.integers(0, 64),
    text=st.sampled_from(["same", "none", "int8"]),
)
def test_the_reservation_holds_a_prompt_of_text_image_and_residual_window(chunks, image, cached, residual, text):
    spec = loader.normalise(loader.codec("int4"), {"residual": residual, "text": text}, "compression.wire")
    tokens = sum(chunks)
    slots = Slots(cached + tokens, (image,) if image[0] < image[1] else ())
    used, start = 0, cached
    for chunk in chunks:
        for _, count, place in runs(spec, slots, start, chunk):
            used += aligned(encoded_bytes(count, table(spec)[place], LAYOUT))
        start += chunk
    assert LAYOUT.layers * used <= reserve_bytes(tokens, spec, LAYOUT, slots)


@given(st.integers(0, 1000), st.integers(0, 5000), st.integers(1, 512), st.integers(1, 4096))
def test_pieces_cover_a_run_once_and_respect_the_limit(start, tokens, token_bytes, limit):
    reached = start
    for first, length in cut(start, tokens, token_bytes, limit):
        assert first == reached
        assert length >= 1
        assert length * token_bytes <= limit or length == 1
        reached += length
    assert reached == start + tokens
