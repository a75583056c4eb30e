from __future__ import annotations

import dataclasses

import pytest
import torch

from prismserve.compression.apply import plan_visual
from prismserve.compression.loader import normalise, visual_method
from tests.compression.visual.slow import video


def planned(features, **params):
    return plan_visual(features, normalise(visual_method("llamavid_context"), params, "compression.visual"))


def asked(frames, patches, seen):
    """A video, and a branch that tells what it is given and looks at the patches in turn."""

    def guided(shown, class_tokens):
        seen.append((shown, class_tokens))
        looked = torch.arange(1.0, patches + 1).expand(frames, -1) / sum(range(patches + 1))
        return looked, torch.arange(frames).float()[:, None].expand(-1, 4)

    class_tokens = torch.randn(frames, 6, generator=torch.Generator().manual_seed(5))
    features = video(frames, patches, grid=(2, patches // 2))
    return dataclasses.replace(features, class_token=class_tokens, guided=guided)


def test_each_frame_has_its_context_token_and_the_mean_behind_it():
    seen = []
    features = asked(3, 4, seen)
    plan = planned(features, keep=6)
    ((shown, class_tokens),) = seen
    assert torch.equal(shown, features.tokens.view(3, 4, 6))
    assert torch.equal(class_tokens, features.class_token)
    assert plan.indices.tolist() == [6, 7, 8, 9, 10, 11]
    assert plan.written.rows.tolist() == [0, 2, 4]
    assert plan.written.embeds[:, 0].tolist() == [0.0, 1.0, 2.0]
    for frame in range(3):
        own = slice(4 * frame, 4 * frame + 4)
        assert torch.allclose(plan.weights[2 * frame, own], torch.tensor([0.1, 0.2, 0.3, 0.4]))
        assert plan.weights[2 * frame + 1, own].tolist() == [0.25] * 4
    assert torch.allclose(plan.weights.sum(1), torch.ones(6))


@pytest.mark.parametrize(
    ("keep", "rows", "frames"), [(2, [0, 1], [1, 2]), (3, [0, 1, 2], [0, 1, 2]), (4, [0, 1, 2], [0, 1, 2, 2])]
)
def test_what_does_not_reach_for_two_tokens_a_frame_goes_to_context_first(keep, rows, frames):
    plan = planned(asked(3, 4, []), keep=keep)
    assert plan.written.rows.tolist() == rows
    assert [int(row.argmax()) // 4 for row in plan.weights] == frames
