from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import quality
from prismserve.compression import loader, presets


def test_every_method_with_a_budget_is_measured():
    listed = set(quality.methods())
    visual = {name for name in loader.names("visual") if loader.visual_method(name).training_free}
    assert visual - {"none"} <= listed
    assert {"oracle", "prefill/fastv", "prefill/random"} <= listed
    assert "prefill/none" not in listed


def test_it_measures_asks_and_writes(tmp_path, capsys):
    arguments = ["--per-family", "1", "--methods", "pool,oracle,cdpruner,prefill/fastv", "--keeps", "24"]
    assert quality.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["off", "pool", "oracle", "cdpruner", "prefill/fastv"]
    assert {row["total"]["asked"] for row in rows} == {10}
    off, pool, _, _, fastv = rows
    assert off["total"]["share"] >= 0.8 > pool["total"]["share"]
    assert pool["kv_bytes"] < fastv["kv_bytes"] < off["kv_bytes"]
    assert pool["cost_ms"] > 0
    assert "| 24 | cdpruner | QRY |" in (tmp_path / "quality.md").read_text()
    assert (tmp_path / "quality.png").stat().st_size > 1000
    assert "written to" in capsys.readouterr().out


def test_rows_measured_anew_take_the_places_of_old_ones(tmp_path, capsys):
    arguments = ["--per-family", "1", "--keeps", "24", "--out", str(tmp_path), "--methods"]
    assert quality.main([*arguments, "pool,random"]) == 0
    before = json.loads((tmp_path / "quality.json").read_text())
    assert quality.main([*arguments, "salience,random", "--update"]) == 0
    after = json.loads((tmp_path / "quality.json").read_text())
    assert [row["method"] for row in after["rows"]] == ["off", "pool", "random", "salience"]
    assert after["rows"][:2] == before["rows"][:2]
    assert {key: after["rows"][2][key] for key in ("total", "kv_bytes")} == {
        key: before["rows"][2][key] for key in ("total", "kv_bytes")
    }
    assert (
        after["conditions"]
        == before["conditions"] + " Those of salience, random were measured later, in a run of their own."
    )
    with pytest.raises(SystemExit):
        quality.main([*arguments, "random", "--update", "--seed", "5"])
    assert "rows of other questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--methods", "nope"], ["--keeps", "0"], ["--keeps", "x"], ["--per-family", "0"]]
)
def test_arguments_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        quality.main(arguments)
    assert "error" in capsys.readouterr().err


def test_no_preset_is_below_random_on_any_family_in_the_published_table():
    results = json.loads((Path(quality.__file__).parent / "results" / "quality.json").read_text(encoding="utf-8"))
    rows = {(row["method"], row["keep"]): row["families"] for row in results["rows"]}
    for preset in presets.names():
        visual = presets.resolve(preset, "off").visual
        if visual.name == "none":
            continue
        keep = loader.kept_tokens(visual, 196)
        near = min(quality.KEEPS, key=lambda count: abs(count - keep))
        mine, control = rows[visual.name, near], rows["random", near]
        assert all(mine[family]["share"] >= control[family]["share"] for family in control), preset
