from __future__ import annotations

import pytest
import torch

from prismserve.kernels import int4


def test_byte_j_holds_channels_j_and_j_plus_half():
    codes = torch.arange(8, dtype=torch.uint8).view(1, 1, 8)
    packed = int4.pack(codes)
    assert packed.flatten().tolist() == [0x40, 0x51, 0x62, 0x73]
    assert torch.equal(int4.unpack(packed), codes)


@pytest.mark.parametrize("shape", [(1, 1, 64), (33, 2, 80), (5, 3, 256)])
@pytest.mark.parametrize("group", [0, 16, 100])
def test_the_error_is_at_most_half_a_step(shape, group):
    x = torch.randn(shape) * 3 + 1
    per_token = int4.quantise_per_token(x)
    assert per_token.codes.shape == (*shape[:2], shape[2] // 2)
    assert ((int4.dequantise_per_token(per_token) - x).abs() <= per_token.scale * 0.5001 + 1e-6).all()
    per_channel = int4.quantise_per_channel(x, group)
    steps = per_channel.scale.repeat_interleave(group or shape[0], 0)[: shape[0]]
    assert ((int4.dequantise_per_channel(per_channel, group) - x).abs() <= steps * 0.5001 + 1e-6).all()


def test_no_tokens_and_constants_come_back():
    for x in (torch.zeros(0, 2, 8), torch.full((4, 2, 8), -2.5)):
        torch.testing.assert_close(int4.dequantise_per_token(int4.quantise_per_token(x)), x)
        torch.testing.assert_close(int4.dequantise_per_channel(int4.quantise_per_channel(x, 3), 3), x)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="even number"):
        int4.quantise_per_token(torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="floating-point"):
        int4.quantise_per_token(torch.zeros(2, 2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match="need 1 scales"):
        int4.dequantise_per_channel(int4.quantise_per_channel(torch.zeros(4, 1, 2), 2), 4)
