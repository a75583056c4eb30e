from __future__ import annotations

import dataclasses

import torch

from prismserve.compression.apply import plan_visual
from prismserve.compression.loader import normalise, visual_method
from tests.compression.visual.slow import video


def planned(features, **params):
    return plan_visual(features, normalise(visual_method("vqtoken_attention"), params, "compression.visual"))


def test_the_attention_is_given_a_map_whose_numbers_are_those_of_the_codes():
    asked = []

    def coded(places, codes):
        asked.append((places, codes))
        return codes + 1

    unpooled = torch.randn(3, 16, 7, generator=torch.Generator().manual_seed(1))
    plan = planned(dataclasses.replace(video(3, 4), unpooled=unpooled, coded=coded), keep=5)
    ((places, codes),) = asked
    unit = torch.nn.functional.normalize(unpooled.flatten(0, 1), dim=-1)
    flat = places.flatten().tolist()
    assert places.shape == (3, 16)
    assert list(dict.fromkeys(flat)) == [0, 1, 2, 3, 4], "numbered by the first member"
    for code in range(5):
        members = [row for row, own in zip(unit, flat, strict=True) if own == code]
        assert torch.allclose(codes[code], torch.stack(members).mean(0), atol=1e-6)
    assert plan.written.rows.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(plan.written.embeds, codes + 1)


def test_tokens_stand_at_the_end_and_say_which_frame_their_row_is_of():
    unpooled = torch.randn(3, 16, 7, generator=torch.Generator().manual_seed(2))
    plan = planned(dataclasses.replace(video(3, 4), unpooled=unpooled, coded=lambda _, codes: codes), keep=5)
    assert plan.indices.tolist() == [7, 8, 9, 10, 11]
    frames = [sorted({at // 4 for at in row.nonzero()[:, 0].tolist()}) for row in plan.weights]
    assert frames == [[0], [1], [2], [0], [1]]
    assert torch.allclose(plan.weights.sum(1), torch.ones(5))
