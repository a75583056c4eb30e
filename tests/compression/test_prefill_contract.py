"""What every prefill method must hold, whatever it ranks by: walks the folder, so a new file is tested as it appears."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from prismserve.compression import loader
from prismserve.compression.base import KeepConfig, Share, Stage
from prismserve.compression.cuts import ChoosesRaters, CutInputs, CutNeed, Grid, Raters, Tap
from prismserve.core.errors import InvalidRequestError
from tests.compression.visual.slow import cosine, largest_determinant

METHODS = loader.names("prefill")
REDUCING = tuple(name for name in METHODS if name != "none")
BUDGETED = tuple(name for name in REDUCING if issubclass(loader.prefill_method(name).Config, KeepConfig))
ALL_OF_IT = {"framefusion": {"cost": 1.0}, "sttm": {"spatial": 1.1, "temporal": 1.1}}
LAYERS, HEADS, WIDTH = 12, 4, 8


def method_and_config(name, **params):
    method = loader.prefill_method(name)
    return method, method.Config(**params)


def make_inputs(grids, cut=0, history=None, cut_layers=None, seed=0, raters=3):
    """Random inputs of a cut, as if nothing had left before it but from the end."""
    generator = torch.Generator().manual_seed(seed)
    whole = sum(grid.tokens for grid in grids)
    history = history or (whole,) * (cut + 1)
    count = history[-1]
    medium = torch.cat([torch.full((grid.tokens,), i) for i, grid in enumerate(grids)] or [torch.empty(0)]).long()
    places = torch.cat([torch.arange(grid.tokens) for grid in grids] or [torch.empty(0)]).long()
    scores = torch.rand(raters, HEADS, count, generator=generator)
    return CutInputs(
        layers=LAYERS,
        cut_layers=cut_layers or tuple(range(1, cut + 2)),
        history=history,
        grids=tuple(grids),
        medium=medium[:count],
        places=places[:count],
        sizes=torch.ones(count),
        seed=b"pixels\0\1",
        scores=scores / (scores.sum(-1, keepdim=True) + 0.1),
        rope_scores=torch.rand(raters, count, generator=generator) + 0.01,
        hidden=torch.randn(count, WIDTH, generator=generator),
        keys=torch.randn(count, 2, 4, generator=generator),
        query_sums=torch.randn(HEADS, count, generator=generator),
    )


def walk(name, grids, seed=0, **params):
    """All plans of a method, one cut after the other, and the counts."""
    method, config = method_and_config(name, **params)
    history, plans = (sum(grid.tokens for grid in grids),), []
    cuts = method.cuts(config, LAYERS)
    for number in range(len(cuts)):
        layers = tuple(cut.layer for cut in cuts[: number + 1])
        inputs = make_inputs(grids, number, history, layers, seed + number)
        plans.append((inputs, method.plan(number, inputs, config)))
        history += (len(plans[-1][1].indices),)
    return plans, history


def test_the_folder_holds_the_methods_of_the_survey_and_the_controls():
    named = {"lens", "fastv", "pyramiddrop", "sparsevlm", "asap", "framefusion", "sttm", "holitom_inner", "pumer"}
    assert named | {"none", "random", "uniform"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_declarations_are_complete_and_the_name_is_the_file(name):
    method = loader.prefill_method(name)
    assert method.name == name
    assert method.stage is Stage.PREFILL
    assert isinstance(method.share, Share)
    assert method.version >= 1
    assert method.Config().model_config["frozen"]
    cuts = method.cuts(method.Config(), LAYERS)
    layers = [cut.layer for cut in cuts]
    assert layers == sorted(set(layers))
    assert all(0 <= layer < LAYERS for layer in layers)
    for cut in cuts:
        assert cut.layer > 0 or cut.tap is not Tap.BEFORE
        assert (cut.raters is Raters.NONE) or cut.tap is not Tap.NONE
        assert cut.raters is not Raters.CHOSEN or isinstance(method, ChoosesRaters)
        assert not cut.blend or CutNeed.QUERY_SUMS in cut.needs
    asks = any(cut.raters is not Raters.NONE for cut in cuts)
    assert asks == (method.share is Share.QUERY)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 60, 196])
@pytest.mark.parametrize("keep", [1, 2, 5, 24, 1000, 0.01, 0.125, 0.5, 0.99])
def test_the_budget_is_exact_and_known_beforehand(name, count, keep):
    method, config = method_and_config(name, keep=keep)
    wanted = max(1, min(count, keep if isinstance(keep, int) else round(keep * count)))
    _, history = walk(name, [Grid(1, 1, count)], keep=keep)
    assert history[1:] == method.kept_tokens(config, LAYERS, count)
    assert history[-1] == wanted


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize("grids", [[Grid(1, 1, 1)], [Grid(1, 3, 5)], [Grid(4, 5, 3)], [Grid(1, 2, 2), Grid(3, 2, 4)]])
def test_plans_are_sound_within_bounds_and_the_same_every_time(name, grids):
    method, config = method_and_config(name)
    plans, history = walk(name, grids)
    again, _ = walk(name, grids)
    bounds = method.kept_tokens(config, LAYERS, history[0])
    for (inputs, plan), (_, other), bound in zip(plans, again, bounds, strict=True):
        assert plan.indices.dtype == torch.int64
        assert (plan.indices.diff() > 0).all()
        assert int(plan.indices[0]) >= 0
        assert int(plan.indices[-1]) < inputs.tokens
        assert 1 <= len(plan.indices) <= bound
        assert torch.equal(plan.indices, other.indices)
        if plan.targets is None:
            assert plan.weights is None
            continue
        assert torch.equal(plan.targets[plan.indices], torch.arange(len(plan.indices)))
        joined = plan.targets >= 0
        sums = torch.zeros(len(plan.indices)).index_add(0, plan.targets[joined], plan.weights[joined])
        assert torch.allclose(sums, torch.ones_like(sums)), "what is folded together is an average"
        assert torch.equal(plan.weights, other.weights)
        assert (plan.weights[~joined] == 0).all()


@pytest.mark.parametrize("name", REDUCING)
def test_keeping_all_is_the_identity(name):
    for params in [ALL_OF_IT[name]] if name in ALL_OF_IT else ({"keep": 1.0}, {"keep": 40}, {"keep": 41}):
        plans, history = walk(name, [Grid(2, 4, 5)], **params)
        assert set(history) == {40}
        for inputs, plan in plans:
            assert torch.equal(plan.indices, torch.arange(40))
            folded = plan.targets is None or torch.equal(plan.weights, torch.ones(inputs.tokens))
            assert folded


@pytest.mark.parametrize("name", REDUCING)
def test_a_method_uses_only_what_its_cuts_ask_for(name):
    method, config = method_and_config(name)
    fields = {
        CutNeed.HIDDEN: "hidden",
        CutNeed.KEYS: "keys",
        CutNeed.QUERY_SUMS: "query_sums",
        CutNeed.ROPE_SCORES: "rope_scores",
    }
    plans, _ = walk(name, [Grid(2, 4, 5)])
    for number, (cut, (inputs, plan)) in enumerate(zip(method.cuts(config, LAYERS), plans, strict=True)):
        hidden = {field: None for need, field in fields.items() if need not in cut.needs}
        if cut.raters is Raters.NONE:
            hidden["scores"] = None
        assert torch.equal(method.plan(number, dataclasses.replace(inputs, **hidden), config).indices, plan.indices)


@pytest.mark.parametrize("name", [n for n in BUDGETED if loader.prefill_method(n).nested])
def test_a_nested_method_keeps_a_subset_at_a_smaller_budget(name):
    kept = [set(walk(name, [Grid(1, 6, 10)], keep=keep)[0][0][1].indices.tolist()) for keep in (5, 20, 59)]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize("name", REDUCING)
def test_a_decoder_without_room_for_the_cuts_is_refused_by_field(name):
    method = loader.prefill_method(name)
    config = method.Config(layer=12) if "layer" in method.Config.model_fields else method.Config()
    if name == "framefusion":
        assert [cut.layer for cut in method.cuts(config, 1)] == [0]
        return
    with pytest.raises(InvalidRequestError) as caught:
        method.cuts(config, 12 if hasattr(config, "layer") else 1)
    assert caught.value.field.startswith("compression.prefill")


# ---- the formulas, once more and slowly ----------------------------------------------------------------------------


def ranked(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def test_fastv_and_pyramiddrop_keep_the_largest_mean_over_heads_of_the_last_row():
    for name, keep in (("fastv", 7), ("pyramiddrop", 7)):
        (inputs, plan), *_ = walk(name, [Grid(1, 4, 5)], keep=keep)[0]
        last = [sum(float(inputs.scores[-1, h, i]) for h in range(HEADS)) / HEADS for i in range(20)]
        assert plan.indices.tolist() == ranked(last, len(plan.indices))


def test_sparsevlm_recycles_the_best_of_the_dropped_around_dense_centres():
    method, config = method_and_config("sparsevlm", keep=0.2)
    inputs = make_inputs([Grid(1, 10, 12)])
    plan = method.plan(0, inputs, config)
    ratings = [float(inputs.scores[:, :, i].mean()) for i in range(120)]
    order = sorted(range(120), key=lambda i: (-ratings[i], i))
    kept = len(plan.indices)
    straight = next(t for t in range(kept, 0, -1) if t + round(0.3 * (120 - t)) // 10 + 1 <= kept)
    pool = sorted(order[straight : straight + round(0.3 * (120 - straight))])
    centres = kept - straight
    points = inputs.hidden.double()

    def distance(a, b):
        return float((points[a] - points[b]).norm()) / WIDTH**0.5

    density = {a: torch.tensor([-sum(sorted(distance(a, b) ** 2 for b in pool)[:5]) / 5]).exp().item() for a in pool}
    furthest = max(distance(a, b) for a in pool for b in pool)
    apart = {
        a: min((distance(a, b) for b in pool if (density[b], -b) > (density[a], -a)), default=furthest) for a in pool
    }
    chosen = sorted(sorted(pool, key=lambda a: (-density[a] * apart[a], a))[:centres])
    assert plan.indices.tolist() == sorted(order[:straight] + chosen)
    for token in pool:
        centre = token if token in chosen else min(chosen, key=lambda c: distance(token, c))
        assert plan.indices[plan.targets[token]] == centre
    dropped = set(range(120)) - set(order[:straight]) - set(pool)
    assert all(plan.targets[token] == -1 for token in dropped)


def test_asap_merges_near_duplicates_into_the_more_salient_and_refills():
    method, config = method_and_config("asap", keep=4, similarity=0.99)
    inputs = make_inputs([Grid(1, 2, 5)])
    hidden = inputs.hidden.clone()
    mean = inputs.query_sums.mean(0)
    order = mean.argsort(descending=True)
    hidden[order[2]] = hidden[order[0]] * 2
    plan = method.plan(0, dataclasses.replace(inputs, hidden=hidden), config)
    assert plan.indices.tolist() == sorted(order[[0, 1, 3, 4]].tolist())
    strength = (mean - mean.min()) / (mean.max() - mean.min())
    leader = plan.indices.tolist().index(int(order[0]))
    assert plan.targets[order[2]] == leader
    share = strength[order[2]] / (strength[order[0]] + strength[order[2]])
    assert torch.isclose(plan.weights[order[2]], share)


def test_framefusion_averages_runs_of_like_patches_over_time_and_meets_its_cost():
    method, config = method_and_config("framefusion", cost=0.5)
    inputs = make_inputs([Grid(4, 2, 2)], cut_layers=(0,))
    hidden = inputs.hidden.clone()
    hidden[4] = hidden[8] = hidden[0].clone()
    hidden[14] = hidden[10]
    plan = method.plan(0, dataclasses.replace(inputs, hidden=hidden), dataclasses_like(config, similarity=0.999))
    assert plan.indices.tolist() == [i for i in range(16) if i not in {4, 8, 14}]
    assert plan.targets[4] == plan.targets[8] == plan.targets[0] == 0
    assert torch.allclose(plan.weights[[0, 4, 8]], torch.full((3,), 1 / 3))
    plans, history = walk("framefusion", [Grid(4, 4, 4)], cost=0.5)
    layers = [cut.layer for cut in method.cuts(config, LAYERS)] + [LAYERS]
    spent = sum(n * (b - a) for n, a, b in zip(history[1:], layers[:-1], layers[1:], strict=True))
    assert spent <= 0.5 * LAYERS * 64
    assert plans


def dataclasses_like(config, **changes):
    return type(config)(**{**config.model_dump(), **changes})


def test_sttm_stops_where_a_region_looks_like_its_parts_and_merges_over_time():
    method, config = method_and_config("sttm", spatial=0.99, temporal=0.99)
    grid = Grid(2, 4, 4)
    hidden = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(2))
    hidden[[0, 1, 4, 5]] = hidden[0].clone()
    hidden[[16, 17, 20, 21]] = hidden[0].clone()
    hidden[16 + 15] = hidden[15]
    inputs = dataclasses.replace(make_inputs([grid]), hidden=hidden)
    plan = method.plan(0, inputs, config)
    gone = {1, 4, 5, 16, 17, 20, 21, 31}
    assert plan.indices.tolist() == [i for i in range(32) if i not in gone]
    assert all(plan.targets[i] == 0 for i in (0, 1, 4, 5, 16, 17, 20, 21))
    assert torch.allclose(plan.weights[[0, 1, 4, 5, 16, 17, 20, 21]], torch.full((8,), 1 / 8))


def test_holitom_averages_the_dropped_into_the_survivor_most_like_them():
    (inputs, plan), = walk("holitom_inner", [Grid(1, 3, 4)], keep=5)[0]  # fmt: skip
    assert plan.indices.tolist() == ranked(inputs.scores[-1].mean(0).tolist(), 5)
    for token in set(range(12)) - set(plan.indices.tolist()):
        likeness = [float(torch.cosine_similarity(inputs.hidden[token], inputs.hidden[s], dim=0)) for s in plan.indices]
        assert plan.targets[token] == likeness.index(max(likeness))


def test_pumer_prunes_by_the_question_and_merges_the_best_pairs():
    method, config = method_and_config("pumer", keep=0.3)
    inputs = make_inputs([Grid(1, 5, 6)])
    plan = method.plan(0, inputs, config)
    kept = method.kept_tokens(config, LAYERS, 30)[0]
    stay = 30 - round(0.1 / 0.37 * (30 - kept))
    alive = ranked(inputs.scores.mean((0, 1)).tolist(), stay)
    metric = inputs.keys.mean(1)
    edges = []
    for a in alive[0::2]:
        likeness = [float(torch.cosine_similarity(metric[a], metric[b], dim=0)) for b in alive[1::2]]
        edges.append((max(likeness), a, alive[1::2][likeness.index(max(likeness))]))
    merged = {a: b for _, a, b in sorted(edges, reverse=True)[: stay - kept]}
    assert plan.indices.tolist() == [i for i in alive if i not in merged]
    assert all(plan.indices[plan.targets[a]] == b for a, b in merged.items())


@pytest.mark.parametrize("theta", [0.0, 0.5, 2.0])
def test_lens_enlarges_the_determinant_of_attention_and_difference_most(theta):
    grids = (Grid(1, 3, 4), Grid(2, 2, 2))
    inputs = make_inputs(grids)
    method, config = method_and_config("lens", keep=6, theta=theta)
    attention = inputs.scores[-1].double().mean(0)
    quality = ((attention / attention.max()) ** theta).tolist()
    hidden = inputs.hidden.double().tolist()
    where = [
        (g, f, r, c)
        for g, s in enumerate(grids)
        for f in range(s.frames)
        for r in range(s.rows)
        for c in range(s.columns)
    ]

    def similar(i, j):
        (one, *here), (other, *there) = where[i], where[j]
        near = math.exp(-(math.dist(here, there) ** 2) / 18) if one == other else 0.0
        return cosine(hidden[i], hidden[j]) * (0.5 + 0.5 * near)

    kernel = [[quality[i] * similar(i, j) * quality[j] for j in range(20)] for i in range(20)]
    assert method.plan(0, inputs, config).indices.tolist() == largest_determinant(kernel, 6)
