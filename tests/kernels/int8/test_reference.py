from __future__ import annotations

import pytest
import torch

from prismserve.kernels.int8 import (
    dequantise_per_channel,
    dequantise_per_token,
    quantise_per_channel,
    quantise_per_token,
    token_groups,
)

SHAPES = [(1, 1, 64), (7, 2, 64), (33, 2, 80), (64, 4, 128), (5, 3, 256)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [0, 1, 16, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_channel_error_is_at_most_half_a_step(shape, group, symmetric):
    x = torch.randn(shape) * 3 + 1
    quantised = quantise_per_channel(x, group, symmetric=symmetric)
    assert quantised.scale.shape == (token_groups(shape[0], group), *shape[1:])
    size = group or shape[0]
    steps = quantised.scale.repeat_interleave(size, 0)[: shape[0]]
    error = (dequantise_per_channel(quantised, group) - x).abs()
    assert (error <= steps * 0.5001 + 1e-6).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_token_error_is_at_most_half_a_step(shape, symmetric):
    x = torch.randn(shape) * 3 + 1
    quantised = quantise_per_token(x, symmetric=symmetric)
    assert quantised.scale.shape == (*shape[:2], 1)
    assert ((dequantise_per_token(quantised) - x).abs() <= quantised.scale * 0.5001 + 1e-6).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_use_their_whole_range(symmetric):
    x = torch.linspace(-1, 1, 100).view(-1, 1, 1)
    codes = quantise_per_channel(x, symmetric=symmetric).codes
    assert codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert (int(codes.min()), int(codes.max())) == ((-127, 127) if symmetric else (0, 255))


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_input_comes_back(value, symmetric):
    x = torch.full((4, 2, 8), value)
    torch.testing.assert_close(dequantise_per_channel(quantise_per_channel(x, 3, symmetric=symmetric), 3), x)
    torch.testing.assert_close(dequantise_per_token(quantise_per_token(x, symmetric=symmetric)), x)


@pytest.mark.parametrize("group", [0, 4])
def test_no_tokens_give_no_codes(group):
    x = torch.zeros(0, 2, 8)
    assert dequantise_per_channel(quantise_per_channel(x, group), group).shape == x.shape
    assert dequantise_per_token(quantise_per_token(x)).shape == x.shape


def test_an_outlier_channel_does_not_spoil_the_others():
    x = torch.randn(32, 1, 8)
    x[:, :, 3] *= 1000
    error = (dequantise_per_channel(quantise_per_channel(x)) - x).abs()
    assert error[:, :, [0, 1, 2, 4, 5, 6, 7]].max() < 0.02


def test_narrow_scales_are_the_ones_codes_were_made_with():
    x = torch.randn(16, 2, 8)
    quantised = quantise_per_channel(x, scale_dtype=torch.float16)
    assert quantised.scale.dtype == torch.float16
    assert (dequantise_per_channel(quantised) - x).abs().max() < 0.02


def test_the_result_has_the_dtype_asked_for():
    x = torch.randn(4, 2, 8, dtype=torch.bfloat16)
    assert dequantise_per_token(quantise_per_token(x), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="floating-point"):
        quantise_per_token(torch.zeros(2, 2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match="group_tokens"):
        quantise_per_channel(torch.zeros(2, 2, 2), -1)
    with pytest.raises(ValueError, match="need 1 scales"):
        dequantise_per_channel(quantise_per_channel(torch.zeros(4, 1, 2), 2), 4)
