from __future__ import annotations

import pytest
import torch
from transformers import Gemma3TextConfig

from prismserve.models.config import DecoderConfig
from prismserve.models.grids import grid_positions
from prismserve.models.rope import component_of_pair, inverse_frequencies, local_frequencies, position_angles
from tests.models.small import SIZES
from tests.models.zoo import SPECIMENS


def decoder(name):
    return DecoderConfig.from_hf(SPECIMENS[name].model(0).config.text_config, tie_word_embeddings=False)


def test_components_follow_one_another_or_alternate():
    assert component_of_pair(decoder("qwen2_vl")).tolist() == [0, 0, 1, 1, 1, 2]
    assert component_of_pair(decoder("qwen3_vl")).tolist() == [0, 1, 2, 0, 1, 2]
    assert component_of_pair(decoder("llava")) is None


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_equal_components_give_the_angles_of_one(name):
    config = decoder(name)
    positions = torch.arange(40)
    frequencies, components = inverse_frequencies(config), component_of_pair(config)
    one = position_angles(positions, frequencies, components)
    three = position_angles(positions.expand(3, -1), frequencies, components)
    for a, b in zip(one, three, strict=True):
        assert torch.equal(a, b)


def test_positions_with_components_need_a_decoder_that_has_them():
    config = decoder("llava")
    with pytest.raises(ValueError, match="positions have one"):
        position_angles(torch.zeros(3, 2, dtype=torch.int64), inverse_frequencies(config), None)


def test_layers_with_a_window_may_have_frequencies_of_their_own():
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = DecoderConfig.from_hf(Gemma3TextConfig(**SIZES, head_dim=8, rope_parameters=ropes))
    torch.testing.assert_close(inverse_frequencies(config), 1e6 ** (-torch.arange(4) / 4) / 8)
    torch.testing.assert_close(local_frequencies(config), 1e4 ** (-torch.arange(4) / 4))


def test_a_picture_is_walked_in_raster_order_at_one_time():
    assert grid_positions(2, 3).tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
