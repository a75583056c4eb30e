from __future__ import annotations

import argparse
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from prismserve.cluster.commands import methods
from prismserve.compression import loader

PAGES = Path(__file__).parents[3] / "docs" / "methods"


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


ACCEPTED = {
    "visual": {
        *("trim", "divprune", "cdpruner", "dpp", "prumerge", "visionzip", "tome", "vispruner", "prism"),
        *("chatunivi", "llamavid", "holitom", "fastvid", "dycoke", "dynamicvlm", "longvu", "flexselect"),
        *("langdc", "vqtoken"),
    },
    "prefill": {"fastv", "sparsevlm", "pyramiddrop", "pumer", "asap", "holitom_inner", "sttm", "framefusion"},
    "codec": {"none", "fp8", "int8", "int4"},
}
CONTROLS = {"none", "random", "uniform"}


def test_the_table_holds_every_column_of_every_method_there_must_be() -> None:
    found = methods.listed()
    columns = {"name", "stage", "section", "share", "training_free", "weights", "needs", "version", "source"}
    assert all(columns <= set(entry) for entry in found)
    by_stage = {stage: {entry["name"] for entry in found if entry["stage"] == stage} for stage in methods.STAGES}
    assert all(names <= by_stage[stage] for stage, names in ACCEPTED.items())
    assert by_stage["visual"] & by_stage["prefill"] >= CONTROLS


def test_prefill_methods_say_what_their_cuts_look_at() -> None:
    needs = {entry["name"]: entry["needs"] for entry in methods.listed() if entry["stage"] == "prefill"}
    assert needs["fastv"] == ["last_attention"]
    assert needs["sparsevlm"] == ["chosen_attention", "hidden"]
    assert needs["pumer"] == ["keys", "question_attention"]
    assert needs["sttm"] == ["hidden", "whole_grid"]
    assert needs["none"] == needs["random"] == []


def test_it_says_whether_the_weights_a_method_needs_are_there(capsys) -> None:
    weights = {entry["name"]: entry["weights"] for entry in methods.listed()}
    assert (weights["prism"], weights["trim"], weights["langdc"]) == ("none needed", "beside the model", "not loaded")
    weights = {entry["name"]: entry["weights"] for entry in methods.listed("reference")}
    assert (weights["prism"], weights["trim"]) == ("none needed", "not loaded")
    assert run("--model", "/no/such/model") == 1
    assert "does not exist" in capsys.readouterr().err


METHODS = [(stage, name) for stage in ("visual", "prefill") for name in loader.names(stage)]
"""Two methods of one name in two stages share a page."""


@pytest.mark.parametrize(("stage", "name"), METHODS)
def test_every_method_has_a_page_whose_source_and_defaults_are_true(stage, name) -> None:
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# `{name}`\n")
    method = loader.method_of(stage, name)
    for number in re.findall(r"arXiv:\S+\d", method.source):
        assert number in page
    table = re.findall(r"^\| `(\w+)` \| (\S+) \|", page, re.MULTILINE)
    for field, info in method.Config.model_fields.items():
        assert any(same(text, info.default) for known, text in table if known == field), (field, info.default)
    known = {field for other, same_name in METHODS if same_name == name for field in fields(other, name)}
    assert {field for field, _ in table} == known


def fields(stage: str, name: str) -> set[str]:
    return set(loader.method_of(stage, name).Config.model_fields)


def same(text: str, default: object) -> bool:
    """Whether a page's cell says the default: a number, a fraction, a word in backticks."""
    if isinstance(default, bool) or default is None or isinstance(default, str):
        return text.strip("`") == str(default).lower()
    return isinstance(default, int | float) and float(Fraction(text)) == pytest.approx(default)


def test_every_prefill_method_is_in_the_overview() -> None:
    overview = (PAGES.parent / "prefill_methods.md").read_text(encoding="utf-8")
    missing = [name for name in loader.names("prefill") if name != "none" and f"(methods/{name}.md)" not in overview]
    assert missing == []
