"""The reviewed table of presets: its losses are those measured, and every method in it acts where the table says."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path

import pytest

from prismserve.compression import loader, presets
from prismserve.compression.presets_table import (
    EXACT,
    FAMILIES,
    PRESETS,
    Basis,
    Evidence,
    allowed,
    basis_of,
    described,
)
from prismserve.core.types import MediaKind
from prismserve.models import families

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
ROWS = {(row["method"], row["keep"]): row for row in json.loads((RESULTS / "quality.json").read_text())["rows"]}
TOKENS = 196
REDUCING = [
    pytest.param(preset, id=f"{basis}-{name}")
    for basis, entries in PRESETS.items()
    for name, preset in entries.items()
    if preset.visual != "none"
]


def measured(preset):
    return ROWS[preset.visual, int(preset.keep * TOKENS)]


@pytest.mark.parametrize("preset", REDUCING)
def test_the_loss_beside_a_preset_is_the_one_that_was_measured(preset):
    off, row = ROWS["off", TOKENS], measured(preset)
    assert preset.lost_points == pytest.approx(100 * (off["total"]["share"] - row["total"]["share"]))
    lost = {name: 100 * (off["families"][name]["share"] - score["share"]) for name, score in row["families"].items()}
    assert dict(preset.worst) == pytest.approx({name: lost[name] for name, _ in preset.worst})
    others = [points for name, points in lost.items() if name not in dict(preset.worst)]
    assert min(points for _, points in preset.worst) >= max(others) - 1e-9


@pytest.mark.parametrize("preset", REDUCING)
def test_no_method_in_a_preset_is_below_random_in_any_family_of_questions(preset):
    row, control = measured(preset), ROWS["random", int(preset.keep * TOKENS)]
    assert {
        name: (score["share"], control["families"][name]["share"])
        for name, score in row["families"].items()
        if score["share"] < control["families"][name]["share"]
    } == {}


@pytest.mark.parametrize("preset", REDUCING)
def test_a_method_in_a_preset_needs_no_question_and_no_training(preset):
    method = loader.visual_method(preset.visual)
    assert method.share == "AGN"
    assert method.training_free


@pytest.mark.parametrize("basis", Basis)
def test_every_basis_has_every_preset_and_a_smaller_one_never_keeps_more(basis):
    entries = PRESETS[basis]
    assert tuple(entries) == presets.names() == ("off", "quality", "balanced", "turbo")
    assert entries["off"] == EXACT
    shares = [entry.keep for entry in entries.values()]
    assert shares == sorted(shares, reverse=True)
    for name, entry in entries.items():
        plan = presets.resolve(name, "off", basis)
        assert (plan.preset, plan.visual.name, plan.wire.name) == (name, entry.visual, entry.codec)
        assert loader.kept_tokens(plan.visual, TOKENS) == (int(entry.keep * TOKENS))


def test_a_method_is_on_a_basis_that_gives_it_what_it_needs():
    salient = frozenset({"cls_attention", "encoder_keys"})
    assert allowed(salient) is Basis.SALIENCE
    for name in ("quality", "balanced", "turbo"):
        assert not loader.encoder_needs(PRESETS[Basis.RASTER][name].visual)
        assert frozenset() < loader.encoder_needs(PRESETS[Basis.SALIENCE][name].visual) <= salient
        assert PRESETS[Basis.NOTHING][name].visual == "none"


def test_every_family_that_sees_has_a_line_and_no_other_has():
    files = {module.name for module in pkgutil.iter_modules(families.__path__)}
    assert set(FAMILIES) == files - {"causal_lm"}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_bundled_models_family_claims_a_measurement(family):
    entry = FAMILIES[family]
    reduces = {entry.images, entry.videos} - {None, Basis.NOTHING}
    expected = Evidence.NONE if not reduces else Evidence.MEASURED if family == "llava" else Evidence.CARRIED
    assert entry.evidence is expected
    assert all(told["evidence"] == entry.evidence.value for told in described(family).values())
    assert all(("videos" in told) == (entry.videos is not None) for told in described(family).values())


@pytest.mark.parametrize(
    ("family", "able", "expected"),
    [
        ("llava", {MediaKind.IMAGE: frozenset({"cls_attention", "encoder_keys"})}, Basis.SALIENCE),
        ("llava", {}, Basis.SALIENCE),
        ("llava_onevision", {MediaKind.VIDEO: frozenset()}, Basis.RASTER),
        # One plan is for all media of a request.
        ("llava_onevision", {MediaKind.VIDEO: frozenset(), MediaKind.IMAGE: None}, Basis.NOTHING),
        ("qwen_vl", {MediaKind.VIDEO: frozenset(), MediaKind.IMAGE: frozenset()}, Basis.RASTER),
        ("of tomorrow", {MediaKind.IMAGE: frozenset()}, Basis.RASTER),
        ("of tomorrow", {MediaKind.IMAGE: frozenset({"cls_attention"})}, Basis.RASTER),
        ("of tomorrow", {MediaKind.IMAGE: None}, Basis.NOTHING),
        ("causal_lm", {}, Basis.NOTHING),
    ],
)
def test_a_request_gets_the_least_of_what_its_media_allow(family, able, expected):
    assert basis_of(family, able) is expected


def test_a_preset_is_told_in_words():
    told = described("llava_onevision")["turbo"]
    assert told["images"] == "int8"
    assert told["images_loss"] == ""
    assert told["videos"] == "salience 12.5 %, int8"
    assert told["videos_loss"] == "8.9 points (count 31, caption 21)"
    assert described("llava_next")["quality"]["images"] == "exact"
    assert described("of tomorrow") == {}
