from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from prismserve.compression.apply import apply_visual
from prismserve.compression.base import VisualFeatures
from prismserve.compression.loader import normalise
from prismserve.compression.visual.visionzip import METHOD
from prismserve.core.errors import EngineError, InvalidRequestError


def run(features, **params):
    return apply_visual(features, normalise(METHOD, params, "compression.visual"))


def cosine(a, b):
    norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


def slow_visionzip(features, kept, contextual, merge):
    """The method told again in plain lists, one token at a time: {raster index: token}."""
    count = len(features.tokens)
    tokens = features.tokens.double().tolist()
    score = [sum(row[i] for row in features.cls_attention.tolist()) for i in range(count)]
    n_context = round(contextual * kept)
    dominant = sorted(range(count), key=lambda i: (-score[i], i))[: kept - n_context]
    out = {i: tokens[i] for i in dominant}
    rest = [i for i in range(count) if i not in out]
    stride = len(rest) // n_context if n_context else 1
    targets = rest[::stride][:n_context]
    metric = features.keys.double().mean(1).tolist()
    members = {t: [] for t in targets}
    for i in rest:
        if i not in members and members:
            best = max(targets, key=lambda t, i=i: (cosine(metric[i], metric[t]), -t))
            members[best].append(i)
    for target, assigned in members.items():
        out[target] = tokens[target]
        if assigned and merge != "none":
            mean = [sum(column) / len(assigned) for column in zip(*(tokens[i] for i in assigned), strict=True)]
            scale = 1.0 if merge == "sum" else 0.5
            out[target] = [scale * (a + b) for a, b in zip(tokens[target], mean, strict=True)]
    return out


@pytest.mark.parametrize("merge", ["sum", "mean", "none"])
@pytest.mark.parametrize("contextual", [0.0, 10 / 64, 0.5, 1.0])
@pytest.mark.parametrize(("count", "keep"), [(2, 1), (9, 4), (60, 24), (60, 59), (196, 24)])
def test_equals_the_method_told_one_token_at_a_time(count, keep, contextual, merge, make_features):
    features = make_features(count, seed=count + keep)
    want = slow_visionzip(features, keep, contextual, merge)
    tokens, indices = run(features, keep=keep, contextual=contextual, merge=merge)
    assert indices.tolist() == sorted(want)
    expected = torch.tensor([want[i] for i in sorted(want)], dtype=torch.float32)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-6)


def test_equal_attention_is_decided_by_the_lower_index(make_features):
    features = dataclasses.replace(make_features(20), cls_attention=torch.full((3, 20), 0.05))
    _, indices = run(features, keep=6, contextual=0.0)
    assert indices.tolist() == [0, 1, 2, 3, 4, 5]


def test_equal_similarity_is_decided_by_the_lower_index():
    attention = torch.tensor([[9.0, 1.0, 1.0, 1.0, 1.0]])
    features = VisualFeatures(
        tokens=torch.arange(5.0)[:, None] + 1, grid=(1, 5), seed=b"", cls_attention=attention, keys=torch.ones(5, 1, 2)
    )
    tokens, indices = run(features, keep=3, contextual=2 / 3, merge="sum")
    assert indices.tolist() == [0, 1, 3]
    assert tokens[:, 0].tolist() == [1.0, 2.0 + (3.0 + 5.0) / 2, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dominant_tokens_are_bit_equal_to_the_input(dtype, make_features):
    features = make_features(60, dtype=dtype)
    tokens, indices = run(features, keep=24)
    score = features.cls_attention.sum(0)
    dominant = torch.isin(indices, score.argsort(descending=True)[:20])
    assert dominant.sum() == 20
    assert torch.equal(tokens[dominant], features.tokens[indices[dominant]])
    assert tokens.dtype == dtype


def test_merging_by_mean_is_half_of_merging_by_sum(make_features):
    features = make_features(60)
    doubled, _ = run(features, keep=12, merge="sum")
    halved, _ = run(features, keep=12, merge="mean")
    merged = (doubled != halved).any(1)
    assert merged.any()
    torch.testing.assert_close(doubled[merged], 2 * halved[merged])


def test_keys_without_direction_are_merged_without_nan(make_features):
    features = dataclasses.replace(make_features(30), keys=torch.zeros(30, 3, 4))
    tokens, _ = run(features, keep=10)
    assert tokens.isfinite().all()


@pytest.mark.parametrize("missing", ["cls_attention", "keys"])
def test_missing_needs_are_named(missing, make_features):
    with pytest.raises(EngineError, match="cls_attention and keys"):
        run(dataclasses.replace(make_features(10), **{missing: None}))


@pytest.mark.parametrize("params", [{"contextual": 1.1}, {"contextual": -0.1}, {"contextual": True}, {"merge": "max"}])
def test_parameters_out_of_range_are_refused_by_field(params):
    with pytest.raises(InvalidRequestError) as caught:
        normalise(METHOD, params, "compression.visual")
    assert caught.value.field == f"compression.visual.{next(iter(params))}"
