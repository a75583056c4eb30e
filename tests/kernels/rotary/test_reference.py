from __future__ import annotations

import pytest
import torch

from prismserve.kernels.rotary import apply_rotary, rotary_angles


@pytest.mark.parametrize("width", [2, 64, 80, 128, 256])
def test_every_pair_of_channels_turns_by_position_times_frequency(width):
    frequencies = torch.rand(width // 2)
    positions = torch.tensor([0, 1, 7, 2047])
    x = torch.randn(4, 3, width)
    pairs = torch.complex(*x.double().chunk(2, dim=-1))
    angles = positions[:, None].double() * frequencies.double()
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    got = apply_rotary(x, *rotary_angles(positions, frequencies))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-3)


def test_position_zero_changes_nothing():
    x = torch.randn(1, 2, 8)
    assert torch.equal(apply_rotary(x, *rotary_angles(torch.tensor([0]), torch.rand(4))), x)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 64)
    frequencies = torch.rand(32)

    def score(at, other):
        turned = [apply_rotary(x, *rotary_angles(torch.tensor([p]), frequencies)) for x, p in ((q, at), (k, other))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(5, 3), score(105, 103), rtol=0, atol=1e-3)


def test_arithmetic_is_float32_and_the_dtype_is_kept():
    x = torch.randn(3, 2, 8, dtype=torch.bfloat16)
    cos, sin = rotary_angles(torch.arange(3), torch.rand(4))
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(apply_rotary(x, cos, sin), apply_rotary(x.float(), cos, sin).bfloat16())
    assert apply_rotary(x[:0], cos[:0], sin[:0]).shape == (0, 2, 8)
