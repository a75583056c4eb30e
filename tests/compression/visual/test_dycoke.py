from __future__ import annotations

import pytest
import torch

from prismserve.compression.visual._video import even_shares
from prismserve.compression.visual.dycoke import METHOD, Dycoke
from prismserve.core.errors import InvalidRequestError
from tests.compression.visual.slow import best, cosine, rows, run, video


def slow(features, drop):
    """The paper's K of every frame that is not the first of its four; [tokens kept, ascending]."""
    x, patches = rows(features.projected), features.grid[0] * features.grid[1]
    kept = []
    for t in range(features.frames):
        if t % 4 == 0:
            kept += range(t * patches, (t + 1) * patches)
            continue
        other = {1: t - 1, 2: t - 2, 3: t - 1}[t % 4]
        alike = [cosine(x[t * patches + p], x[other * patches + p]) for p in range(patches)]
        kept += [t * patches + p for p in best([-a for a in alike], patches - round(drop * patches))]
    return sorted(kept)


@pytest.mark.parametrize("drop", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("frames", [4, 5, 7, 8, 11])
def test_equals_dropping_the_same_share_of_every_later_frame(frames, drop):
    features = video(frames, 10, seed=frames)
    expected = slow(features, drop)
    tokens, indices = run("dycoke", features, keep=len(expected))
    assert indices.tolist() == expected
    assert (tokens == features.tokens[indices]).all()


def test_the_default_is_the_share_of_the_paper():
    features = video(8, 20)
    assert run("dycoke", features)[1].tolist() == slow(features, 0.7)


def test_a_small_budget_takes_the_first_frames_of_groups_for_a_video():
    features = video(16, 6)
    _, indices = run("dycoke", features, keep=12)
    assert {int(i) // 6 for i in indices} <= {0, 4, 8, 12}
    assert set(range(6)) <= set(indices.tolist())
    assert run("dycoke", features, keep=3)[1].tolist() == [1, 3, 5]


def test_an_image_keeps_evenly_spaced_tokens():
    assert run("dycoke", video(1, 12), keep=4)[1].tolist() == [1, 4, 7, 10]


@pytest.mark.parametrize(
    ("total", "capacities", "shares"),
    [
        (7, [5, 5], [3, 4]),
        (7, [1, 9, 9], [1, 3, 3]),
        (0, [3], [0]),
        (6, [2, 0, 4], [2, 0, 4]),
        (2, [9] * 4, [0, 1, 0, 1]),
    ],
)
def test_shares_are_as_equal_as_their_room_allows(total, capacities, shares):
    assert even_shares(total, capacities) == shares


def config(**params):
    return Dycoke.Config(**params)


def test_the_second_stage_is_off_unless_asked_for():
    assert METHOD.focus_layer(config(), 28) is None
    assert METHOD.focus_layer(config(decode=0.3), 28) == 3
    assert METHOD.focus_layer(config(decode=0.3, decode_layer=1), 2) == 1
    with pytest.raises(InvalidRequestError, match="layers 0 to 2"):
        METHOD.focus_layer(config(decode=0.3), 3)


def test_a_step_reads_the_top_share_in_raster_order_and_never_nothing():
    scores = torch.tensor([0.1, 0.5, 0.1, 0.4, 0.5])
    assert METHOD.glance(scores, None, config(decode=0.6)).read.tolist() == [1, 3, 4]
    assert METHOD.glance(scores, None, config(decode=0.8)).read.tolist() == [0, 1, 3, 4], "ties go to the lower index"
    assert METHOD.glance(scores, None, config(decode=0.01)).read.tolist() == [1]


@pytest.mark.parametrize("unchanged", ["last", "all"])
def test_attention_as_before_leaves_the_choice_and_another_brings_tokens_back(unchanged):
    given = config(decode=0.5, unchanged=unchanged)
    first = METHOD.glance(torch.tensor([0.9, 0.1, 0.8, 0.2]), None, given)
    assert first.read.tolist() == [0, 2]
    # Alike enough, although the best two are others now.
    second = METHOD.glance(torch.tensor([0.6, 0.2, 0.5, 0.52]), first, given)
    assert second.read is None if unchanged == "all" else second.read.tolist() == [0, 2]
    third = METHOD.glance(torch.tensor([0.0, 0.9, 0.0, 0.8]), second, given)
    assert third.read.tolist() == [1, 3]
    # Compared with the step before, not with the last one that chose.
    fourth = METHOD.glance(torch.tensor([0.0, 0.8, 0.0, 0.9]), third, given)
    assert fourth.read is None if unchanged == "all" else fourth.read.tolist() == [1, 3]
