"""What every codec must hold; walks the folder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prismserve.compression import loader
from prismserve.compression.base import EncodesParts, Stage
from prismserve.compression.codec.int8 import Int8Config
from prismserve.core.errors import IncompatibleLayoutError
from prismserve.core.types import KVLayout

CODECS = loader.names("codec")
DTYPES = ("float32", "bfloat16", "float16")
HALF_STEP = 0.5 * 1.02
"""Half a quantisation step, with room for float32 arithmetic."""


def layout_of(dtype="float32", kv_heads=2, head_dim=64):
    return KVLayout(dtype=dtype, layers=1, kv_heads=kv_heads, head_dim=head_dim, block_tokens=16)


def random_kv(tokens, layout, seed=0, scale=1.0):
    """Keys with outlier channels and a bias, values without, as decoders have them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, layout.kv_heads, layout.head_dim)
    channel = torch.rand(shape[1:], generator=generator).pow(3) * 8 + 0.1
    keys = torch.randn(shape, generator=generator) * channel * scale + channel
    values = torch.randn(shape, generator=generator) * scale
    dtype = getattr(torch, layout.dtype)
    return keys.to(dtype), values.to(dtype)


def round_trip(name, keys, values, layout, config=None):
    codec = loader.codec(name)
    config = config or codec.Config()
    encoded = codec.encode(keys, values, config)
    assert encoded.dtype == torch.uint8
    assert encoded.dim() == 1
    assert encoded.numel() == codec.encoded_bytes(keys.shape[0], layout, config)
    return codec.decode(encoded, keys.shape[0], layout, config)


def rounding(x, dtype):
    """What storing ``x`` in ``dtype`` may add: half a unit in the last place, or half the smallest step."""
    info = torch.finfo(dtype)
    return x.abs().float() * info.eps / 2 + info.smallest_normal * info.eps


@pytest.mark.parametrize("name", CODECS)
def test_declarations_are_complete_and_the_name_is_the_file(name):
    codec = loader.codec(name)
    assert (codec.name, codec.stage) == (name, Stage.CODEC)
    assert codec.lossy == (name != "none")


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 300),
    kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 3, 8, 64, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape_comes_back_in_shape_dtype_and_stated_size(name, tokens, kv_heads, head_dim, dtype, seed):
    layout = layout_of(dtype, kv_heads, head_dim)
    keys, values = random_kv(tokens, layout, seed)
    if name == "int4" and head_dim % 2:
        with pytest.raises(IncompatibleLayoutError, match="head_dim"):
            round_trip(name, keys, values, layout)
        return
    for before, after in zip((keys, values), round_trip(name, keys, values, layout), strict=True):
        assert after.shape == before.shape
        assert after.dtype == before.dtype
        assert after.isfinite().all()


ERROR_BOUNDS = {
    # name: (relative to the value, absolute relative to the range it was scaled by)
    "none": (0.0, 0.0),
    "fp8": (1 / 16, 1 / 448 / 1024),
    "int8": (0.0, 1.02 / 2 / 127),
    "int4": (0.0, 1.14 / 2 / 15),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "kv_heads", "head_dim"), [(1, 2, 64), (33, 1, 80), (196, 4, 128), (577, 2, 64)])
def test_the_error_stays_within_what_the_codec_promises(name, dtype, tokens, kv_heads, head_dim):
    layout = layout_of(dtype, kv_heads, head_dim)
    keys, values = random_kv(tokens, layout)
    relative, absolute = ERROR_BOUNDS[name]
    per_channel = name.startswith("int") and tokens >= 32
    for before, after, axis in zip(
        (keys, values), round_trip(name, keys, values, layout), (0 if per_channel else -1, -1), strict=True
    ):
        x = before.float()
        low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        span = torch.maximum(high - low, torch.maximum(high.abs(), low.abs()))
        bound = relative * x.abs() + absolute * span + 1.01 * rounding(x, before.dtype) * (name != "none")
        assert ((after.float() - x).abs() <= bound).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_parts_of_an_encoding_are_its_bytes(name, tokens):
    layout, codec = layout_of("bfloat16"), loader.codec(name)
    keys, values = random_kv(tokens, layout)
    assert isinstance(codec, EncodesParts)
    parts = [part.reshape(-1).view(torch.uint8) for part in codec.parts(keys, values, codec.Config())]
    assert torch.equal(torch.cat(parts), codec.encode(keys, values, codec.Config()))


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.16), ("bfloat16", 0.29)])
@pytest.mark.parametrize("tokens", [64, 196, 576, 1000])
def test_int4_shrinks_kv_to_the_share_it_promises(dtype, most, tokens):
    layout, codec = layout_of(dtype), loader.codec("int4")
    assert codec.encoded_bytes(tokens, layout, codec.Config()) <= most * tokens * layout.token_layer_bytes


@pytest.mark.parametrize("name", CODECS)
def test_nothing_encodes_to_nothing(name):
    layout, codec = layout_of(), loader.codec(name)
    assert codec.encoded_bytes(0, layout, codec.Config()) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 17, 196])
def test_none_is_bit_exact(dtype, tokens):
    layout = layout_of(dtype)
    keys, values = random_kv(tokens, layout)
    keys[0, 0, 0], values[0, 0, 0] = float("nan"), float("-inf")
    for before, after in zip((keys, values), round_trip("none", keys, values, layout), strict=True):
        assert torch.equal(before.view(torch.uint8), after.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [32, 100, 196, 300])
def test_int8_keys_are_off_by_at_most_half_a_step_of_their_channel(dtype, tokens):
    layout = layout_of(dtype)
    keys, values = random_kv(tokens, layout)
    restored, _ = round_trip("int8", keys, values, layout)
    step = (keys.float().amax(0) - keys.float().amin(0)) / 255
    assert ((restored.float() - keys.float()).abs() <= HALF_STEP * step + rounding(restored, keys.dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 31, 32, 196])
def test_int8_values_and_short_keys_are_off_by_at_most_half_a_step_of_their_token(dtype, tokens):
    layout = layout_of(dtype)
    keys, values = random_kv(tokens, layout)
    restored_keys, restored_values = round_trip("int8", keys, values, layout)
    pairs = [(values, restored_values)] + ([(keys, restored_keys)] if tokens < 32 else [])
    for before, after in pairs:
        step = before.float().abs().amax(-1, keepdim=True) / 127
        assert ((after.float() - before.float()).abs() <= HALF_STEP * step + rounding(after, before.dtype)).all()


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.27), ("bfloat16", 0.54)])
@pytest.mark.parametrize("tokens", [1, 24, 128, 196, 1000])
def test_int8_shrinks_kv_to_the_share_it_promises(dtype, most, tokens):
    layout, codec = layout_of(dtype), loader.codec("int8")
    assert codec.encoded_bytes(tokens, layout, codec.Config()) <= most * tokens * layout.token_layer_bytes


@pytest.mark.parametrize("tokens", range(1, 260))
def test_int8_never_grows_and_stays_under_30_and_58_percent(tokens):
    codec = loader.codec("int8")
    for dtype, most in (("float32", 0.30), ("bfloat16", 0.58)):
        layout = layout_of(dtype)
        assert codec.encoded_bytes(tokens, layout, codec.Config()) <= most * tokens * layout.token_layer_bytes


def test_int8_keeps_constant_channels_and_zero_tokens_exactly():
    layout = layout_of()
    keys, values = torch.full((64, 2, 64), 3.25), torch.zeros(64, 2, 64)
    restored = round_trip("int8", keys, values, layout)
    assert torch.equal(restored[0], keys)
    assert torch.equal(restored[1], values)


def test_int8_groups_confine_an_outlier_to_its_own():
    layout, config = layout_of(), Int8Config(group_tokens=32)
    keys, values = random_kv(128, layout)
    keys[100] = 1e4
    restored, _ = round_trip("int8", keys, values, layout, config)
    clean = slice(0, 96)
    step = (keys[clean].amax(0) - keys[clean].amin(0)) / 255
    assert ((restored[clean] - keys[clean]).abs() <= HALF_STEP * step + 1e-6).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_payload_may_lie_at_any_offset_of_a_buffer(name, dtype):
    layout, codec = layout_of(dtype), loader.codec(name)
    keys, values = random_kv(40, layout)
    encoded = codec.encode(keys, values, codec.Config())
    want = codec.decode(encoded, 40, layout, codec.Config())
    for offset in (1, 2, 3, 4, 7):
        arena = torch.zeros(encoded.numel() + 16, dtype=torch.uint8)
        place = arena[offset : offset + encoded.numel()]
        place.copy_(encoded)
        got = codec.decode(place, 40, layout, codec.Config())
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("name", CODECS)
def test_views_that_are_not_contiguous_are_encoded_as_their_values(name):
    layout, codec = layout_of("bfloat16"), loader.codec(name)
    keys, values = random_kv(50, layout)
    strided = [torch.stack([x, x + 1], 1)[:, 0] for x in (keys, values)]
    assert not strided[0].is_contiguous()
    config = codec.Config()
    assert torch.equal(codec.encode(*strided, config), codec.encode(keys, values, config))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("change", [-1, 1, 64])
def test_a_payload_of_another_length_is_refused(name, change):
    layout, codec = layout_of(), loader.codec(name)
    config = codec.Config()
    wrong = torch.zeros(codec.encoded_bytes(20, layout, config) + change, dtype=torch.uint8)
    with pytest.raises(IncompatibleLayoutError, match="bytes"):
        codec.decode(wrong, 20, layout, config)


@pytest.mark.parametrize("name", CODECS)
def test_encoding_is_deterministic_and_leaves_the_input_alone(name):
    layout, codec = layout_of(), loader.codec(name)
    keys, values = random_kv(77, layout)
    before = keys.clone(), values.clone()
    config = codec.Config()
    assert torch.equal(codec.encode(keys, values, config), codec.encode(keys, values, config))
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])
