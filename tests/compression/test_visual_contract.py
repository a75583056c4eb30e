"""What every visual method must hold, whatever it ranks by: walks the folder, so a new file is tested as it appears."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prismserve.compression import loader
from prismserve.compression.apply import apply_visual
from prismserve.compression.base import Need, Share, Stage
from prismserve.core.errors import InvalidRequestError

METHODS = loader.names("visual")
REDUCING = tuple(name for name in METHODS if name != "none")


def spec_of(name, **params):
    return loader.normalise(loader.visual_method(name), params, "compression.visual")


def test_the_folder_holds_the_methods_the_presets_and_benchmarks_name():
    assert {"none", "visionzip", "random", "uniform"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_declarations_are_complete_and_the_name_is_the_file(name):
    method = loader.visual_method(name)
    assert method.name == name
    assert method.stage is Stage.VISUAL
    assert isinstance(method.share, Share)
    assert method.version >= 1
    assert all(isinstance(need, Need) for need in method.needs)
    assert method.Config().model_config["frozen"]


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 60, 196])
@pytest.mark.parametrize("keep", [1, 2, 5, 24, 1000, 0.01, 0.125, 0.5, 0.99])
def test_the_budget_is_exact_and_known_before_encoding(name, count, keep, make_features):
    spec = spec_of(name, keep=keep)
    wanted = max(1, min(count, keep if isinstance(keep, int) else round(keep * count)))
    tokens, indices = apply_visual(make_features(count), spec)
    assert loader.kept_tokens(spec, count) == wanted == len(tokens) == len(indices)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("count", [1, 2, 37, 196])
def test_indices_ascend_are_unique_and_in_range(name, count, make_features):
    _, indices = apply_visual(make_features(count), spec_of(name))
    assert indices.dtype == torch.int64
    assert (indices.diff() > 0).all()
    assert indices.min() >= 0
    assert indices.max() < count


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_all_is_the_identity(name, dtype, make_features):
    features = make_features(40, dtype=dtype)
    for budget in ({"keep": 1.0}, {"keep": 40}, {"keep": 41}) if name != "none" else ({},):
        tokens, indices = apply_visual(features, spec_of(name, **budget))
        assert torch.equal(tokens, features.tokens)
        assert tokens.dtype == dtype
        assert torch.equal(indices, torch.arange(40))


@pytest.mark.parametrize("name", METHODS)
def test_the_same_image_gives_the_same_bytes(name, make_features):
    first, second = (apply_visual(make_features(50, seed=3), spec_of(name)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", METHODS)
def test_the_input_is_left_alone(name, make_features):
    features, untouched = make_features(50), make_features(50)
    apply_visual(features, spec_of(name))
    for field in ("tokens", "cls_attention", "keys"):
        assert torch.equal(getattr(features, field), getattr(untouched, field))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_uses_only_what_it_needs(name, make_features):
    method, features = loader.visual_method(name), make_features(50)
    given = {Need.CLS_ATTENTION: "cls_attention", Need.ENCODER_KEYS: "keys"}
    bare = dataclasses.replace(features, **{field: None for need, field in given.items() if need not in method.needs})
    assert torch.equal(apply_visual(bare, spec_of(name))[0], apply_visual(features, spec_of(name))[0])


@pytest.mark.parametrize("name", [n for n in REDUCING if loader.visual_method(n).nested])
def test_a_nested_method_keeps_a_subset_at_a_smaller_budget(name, make_features):
    features = make_features(60)
    kept = [set(apply_visual(features, spec_of(name, keep=keep))[1].tolist()) for keep in (5, 20, 59)]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, 64.0, float("nan"), float("inf"), True, "12", None, 2**63])
def test_a_budget_that_makes_no_sense_is_refused_by_field(name, keep):
    with pytest.raises(InvalidRequestError, match="keep") as caught:
        spec_of(name, keep=keep)
    assert caught.value.field == "compression.visual.keep"
