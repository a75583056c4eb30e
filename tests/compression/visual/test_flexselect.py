from __future__ import annotations

import dataclasses

import pytest
import torch

from prismserve.core.errors import InvalidRequestError
from tests.compression.visual.slow import best, run, video


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("keep", [1, 7, 23])
def test_keeps_what_the_decoder_looks_at_most(keep, reduction, make_features):
    asked = []
    scores = torch.rand(24, generator=torch.Generator().manual_seed(keep))

    def answer(depth, how):
        asked.append((depth, how))
        return scores

    features = dataclasses.replace(make_features(24), asked=answer)
    tokens, indices = run("flexselect", features, keep=keep, depth=0.5, reduction=reduction)
    assert indices.tolist() == sorted(best(scores.tolist(), keep))
    assert torch.equal(tokens, features.tokens[indices])
    assert asked == [(0.5, reduction)]


def test_without_text_it_keeps_evenly_spaced_tokens():
    mute = dataclasses.replace(video(2, 6), asked=lambda _depth, _how: torch.zeros(12))
    assert run("flexselect", mute, keep=4)[1].tolist() == [1, 4, 7, 10]


def test_the_trained_selector_is_refused():
    with pytest.raises(InvalidRequestError, match="weights") as caught:
        run("flexselect", video(2, 6), selector="lite")
    assert caught.value.field == "compression.visual.selector"
