from __future__ import annotations

import pytest
import torch

from prismserve.compression.apply import apply_visual
from prismserve.compression.presets import resolve
from prismserve.core.errors import UnknownMethodError
from prismserve.core.types import MethodSpec


@pytest.mark.parametrize(("preset", "kept"), [("off", 196), ("quality", 98), ("balanced", 49), ("turbo", 24)])
def test_presets_keep_what_they_promise(preset, kept, make_features):
    tokens, indices = apply_visual(make_features(196), resolve(preset, "off").visual)
    assert len(tokens) == len(indices) == kept


def test_off_hands_the_tokens_through_bit_for_bit(make_features):
    features = make_features(196, dtype=torch.bfloat16)
    tokens, _ = apply_visual(features, resolve("off", "off").visual)
    assert torch.equal(tokens, features.tokens)


def test_an_unknown_method_lists_what_there_is(make_features):
    with pytest.raises(UnknownMethodError, match="available: cdpruner, chatunivi, cls_topk, "):
        apply_visual(make_features(4), MethodSpec("nope"))
