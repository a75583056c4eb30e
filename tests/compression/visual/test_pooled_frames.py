"""Dynamic-VLM and the content tokens of LLaMA-VID: each frame pooled by itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from prismserve.core.errors import InvalidRequestError
from tests.compression.visual.slow import run, video

BOTH = pytest.mark.parametrize("name", ["dynamicvlm", "llamavid"])


@BOTH
@pytest.mark.parametrize(("frames", "grid", "side"), [(1, (6, 6), 3), (4, (6, 6), 4), (3, (5, 5), 2), (2, (7, 7), 5)])
def test_equals_adaptive_average_pooling_where_the_share_is_a_square(name, frames, grid, side):
    features = video(frames, grid[0] * grid[1], grid=grid)
    tokens, indices = run(name, features, keep=frames * side * side)
    pictures = features.tokens.view(frames, *grid, -1).permute(0, 3, 1, 2)
    pooled = functional.adaptive_avg_pool2d(pictures, side).permute(0, 2, 3, 1)
    assert torch.allclose(tokens, pooled.reshape(-1, tokens.shape[1]), atol=1e-6)
    assert (indices.diff() > 0).all()


@BOTH
def test_one_token_is_the_mean_of_its_frame(name):
    features = video(5, 6, grid=(2, 3))
    tokens, indices = run(name, features, keep=5)
    assert torch.allclose(tokens, features.tokens.view(5, 6, -1).mean(1), atol=1e-6)
    assert (indices // 6).tolist() == [0, 1, 2, 3, 4]


@BOTH
def test_frames_have_equal_shares_whatever_they_show(name):
    _, indices = run(name, video(4, 12, grid=(3, 4)), keep=22)
    assert sorted(int((indices // 12 == frame).sum()) for frame in range(4)) == [5, 5, 6, 6]


@pytest.mark.parametrize(("name", "field"), [("llamavid", "context"), ("vqtoken", "trained")])
def test_what_was_trained_is_refused_and_not_imitated(name, field):
    with pytest.raises(InvalidRequestError, match="weights") as caught:
        run(name, video(2, 4), keep=4, **{field: True})
    assert caught.value.field == f"compression.visual.{field}"
