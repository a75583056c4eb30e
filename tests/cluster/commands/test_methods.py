from __future__ import annotations

import argparse
import json
from pathlib import Path

from prismserve.cluster.commands import methods
from prismserve.compression import loader


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    methods.add_arguments(parser)
    return methods.run(parser.parse_args(arguments))


def test_json_lists_every_method_of_every_stage_once(capsys) -> None:
    assert run("--json") == 0
    found = json.loads(capsys.readouterr().out)
    names = [(entry["stage"], entry["name"]) for entry in found]
    assert names == [(stage, name) for stage in methods.STAGES for name in loader.names(stage)]
    prism = next(entry for entry in found if entry["name"] == "prism")
    assert (prism["section"], prism["share"], prism["needs"]) == ("own", "AGN", ["cls_attention", "projected"])
    assert prism["parameters"]["keep"] == 0.25


def test_every_method_says_where_it_comes_from() -> None:
    for entry in methods.listed():
        assert entry["section"]
        assert bool(entry["source"]) == (entry["section"] != "control"), entry["name"]


def test_the_table_names_what_a_method_needs(capsys) -> None:
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("visual") and " cdpruner " in line and " QRY " in line for line in lines)
    assert len(lines) > len(methods.listed())


def test_every_visual_method_has_its_page() -> None:
    pages = Path(__file__).parents[3] / "docs" / "methods"
    for name in loader.names("visual"):
        page = (pages / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# `{name}`"), name
        method = loader.visual_method(name)
        for field in method.Config.model_fields:
            assert f"`{field}`" in page, (name, field)
