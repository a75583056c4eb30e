"""What every visual method must hold, whatever it ranks by: walks the folder, so a new file is tested as it appears."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prismserve.compression import loader
from prismserve.compression.apply import apply_visual, plan_visual
from prismserve.compression.base import BESIDE_THE_MODEL, Need, Share, Stage
from prismserve.core.errors import EngineError, InvalidRequestError

EVERY = loader.names("visual")
METHODS = tuple(name for name in EVERY if loader.visual_method(name).training_free or loader.visual_method(name).needs)
REDUCING = tuple(name for name in METHODS if name != "none")


def spec_of(name, **params):
    return loader.normalise(loader.visual_method(name), params, "compression.visual")


def test_the_folder_holds_the_methods_the_presets_and_benchmarks_name():
    controls = {"none", "random", "uniform", "pool", "cls_topk"}
    image = {"visionzip", "divprune", "dpp", "cdpruner", "prumerge", "vispruner", "tome", "trim", "prism", "salience"}
    video = {"chatunivi", "llamavid", "holitom", "fastvid", "dycoke", "dynamicvlm", "longvu", "vqtoken", "flexselect"}
    trained = {"flexselect_lite", "llamavid_context", "vqtoken_attention"}
    assert controls | image | video | trained <= set(METHODS)
    assert set(EVERY) - set(METHODS) == {"langdc"}
    assert {name for name in METHODS if not loader.visual_method(name).training_free} == trained


@pytest.mark.parametrize("name", EVERY)
def test_declarations_are_complete_and_the_name_is_the_file(name):
    method = loader.visual_method(name)
    assert method.name == name
    assert method.stage is Stage.VISUAL
    assert isinstance(method.share, Share)
    assert method.version >= 1
    assert all(isinstance(need, Need) for need in method.needs)
    assert method.section
    assert bool(method.source) == (method.section != "control")
    assert isinstance(method.training_free, bool)
    asking = {Need.TEXT_EMBEDDINGS, Need.QUESTION_ATTENTION, *BESIDE_THE_MODEL} - {Need.CODE_ATTENTION}
    asks = bool(asking & method.needs)
    assert method.share is (Share.QUERY if asks else Share.AGNOSTIC)
    assert method.Config.model_config["frozen"]


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize("count", [1, 2, 7, 60])
@pytest.mark.parametrize("keep", [1, 5, 1000, 0.01, 0.125, 0.99])
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
def test_two_questions_give_the_same_bytes_if_and_only_if_the_method_says_so(name, make_features):
    first, second = (apply_visual(make_features(50, question=question), spec_of(name)) for question in (0, 1))
    same = torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert same == (loader.visual_method(name).share is Share.AGNOSTIC)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (2, 3), (14, 14), (9, 20)])
def test_any_grid_is_taken(name, grid, make_features):
    count = grid[0] * grid[1]
    for keep in {1, max(1, count // 3), count - 1} - {0}:
        spec = spec_of(name, **({} if name == "none" else {"keep": keep}))
        tokens, indices = apply_visual(make_features(count, grid=grid), spec)
        assert len(tokens) == len(indices) == loader.kept_tokens(spec, count)
        assert tokens.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("frames", "grid", "keep"), [(2, (3, 4), 1), (5, (2, 2), 7), (4, (1, 3), 11)])
def test_the_frames_of_a_video_share_one_budget(name, frames, grid, keep, make_features):
    count = frames * grid[0] * grid[1]
    spec = spec_of(name, **({} if name == "none" else {"keep": keep}))
    if name == "vqtoken_attention" and keep < frames:
        with pytest.raises(InvalidRequestError, match="fewer than the 2 frames"):
            apply_visual(make_features(count, grid=grid, frames=frames), spec)
        return
    tokens, indices = apply_visual(make_features(count, grid=grid, frames=frames), spec)
    assert len(tokens) == len(indices) == loader.kept_tokens(spec, count)
    assert (indices.diff() > 0).all()
    assert indices[-1] < count


@pytest.mark.parametrize("name", METHODS)
def test_features_without_direction_are_survived(name, make_features):
    features = make_features(30)
    zeros = {
        field: torch.zeros_like(getattr(features, field))
        for field in ("tokens", "cls_attention", "keys", "projected", "text", "aligned", "aligned_text", "unpooled")
    }
    tokens, indices = apply_visual(dataclasses.replace(features, **zeros), spec_of(name))
    assert tokens.isfinite().all()
    assert (indices.diff() > 0).all()


@pytest.mark.parametrize("name", [n for n in METHODS if loader.visual_method(n).needs])
def test_a_missing_need_is_named(name, make_features):
    method, features = loader.visual_method(name), make_features(50)
    fields = ("cls_attention", "keys", "projected", "text", "asked", "aligned", "aligned_text", "selected")
    bare = dataclasses.replace(features, **dict.fromkeys((*fields, "unpooled", "coded", "class_token", "guided")))
    with pytest.raises(EngineError, match=name) as caught:
        apply_visual(bare, spec_of(name))
    assert all(need.value in str(caught.value) or need is Need.ENCODER_KEYS for need in method.needs)


@pytest.mark.parametrize("name", METHODS)
def test_the_input_is_left_alone(name, make_features):
    features, untouched = make_features(50), make_features(50)
    apply_visual(features, spec_of(name))
    for field in ("tokens", "cls_attention", "keys", "projected", "text", "aligned", "aligned_text", "unpooled"):
        assert torch.equal(getattr(features, field), getattr(untouched, field))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_uses_only_what_it_needs(name, make_features):
    method, features = loader.visual_method(name), make_features(50)
    given = {
        "cls_attention": Need.CLS_ATTENTION,
        "keys": Need.ENCODER_KEYS,
        "projected": Need.PROJECTED,
        "text": Need.TEXT_EMBEDDINGS,
        "asked": Need.QUESTION_ATTENTION,
        "aligned": Need.TEXT_TOWER,
        "aligned_text": Need.TEXT_TOWER,
        "selected": Need.SELECTOR,
        "unpooled": Need.UNPOOLED,
        "coded": Need.CODE_ATTENTION,
        "class_token": Need.CLASS_TOKEN,
        "guided": Need.CONTEXT,
    }
    unasked = {field: None for field, need in given.items() if need not in method.needs}
    bare = dataclasses.replace(features, **unasked)
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


@pytest.mark.parametrize("name", [n for n in EVERY if n not in METHODS])
@pytest.mark.parametrize("params", [{}, {"keep": 5}])
def test_what_exists_only_as_trained_is_refused_with_the_reason(name, params):
    with pytest.raises(InvalidRequestError) as caught:
        spec_of(name, **params)
    assert caught.value.field.startswith("compression.visual")
    if not params:
        assert "needs its own trained weights" in str(caught.value)


@pytest.mark.parametrize("name", ["cls_topk", "divprune", "dpp", "random"])
def test_the_order_of_a_nested_method_says_what_every_smaller_budget_keeps(name, make_features):
    features = make_features(60)
    plan = plan_visual(features, spec_of(name, keep=40))
    for keep in (1, 7, 39):
        smaller = plan_visual(features, spec_of(name, keep=keep))
        assert torch.equal(plan.indices[plan.order[:keep]].sort().values, smaller.indices)
