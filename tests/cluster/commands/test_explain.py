from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from PIL import Image

from prismserve.cluster.commands import explain

SCENE = Path(__file__).parents[3] / "docs" / "assets" / "scene.png"
QUESTION = "What is in the image?"


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    explain.add_arguments(parser)
    return explain.run(parser.parse_args(arguments))


def test_it_draws_and_says_what_became_of_the_patches(tmp_path, capsys) -> None:
    out = tmp_path / "picture.png"
    plan = '{"visual": {"method": "visionzip", "keep": 98}, "prefill": {"method": "pyramiddrop", "keep": 24}}'
    assert run(str(SCENE), QUESTION, "--compression", plan, "--out", str(out)) == 0
    text = capsys.readouterr().out
    for part in ("visionzip, before the decoder", "pyramiddrop, before layer 4", "# kept", f"written to {out}"):
        assert part in text
    lines = [line for line in text.splitlines() if len(line.split()) == 14 and set(line) <= set("#1234 ")]
    assert len(lines) == 14
    assert sum(line.count("#") for line in lines) == 24
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width == 12 + 5 * (392 + 12)


def test_json_holds_the_fate_of_every_token(tmp_path, capsys) -> None:
    out = str(tmp_path / "p.png")
    assert run(str(SCENE), QUESTION, "--method", "fastv", "--keep", "0.25", "--out", out, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["compression"]["prefill"] == {"method": "fastv", "keep": 0.25, "layer": 2}
    (stage,) = document["stages"]
    assert (stage["kept"], stage["dropped"], stage["layer"]) == (49, 147, 2)
    assert len(stage["fates"]) == 196


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        ([str(SCENE), QUESTION, "--method", "no_such"], 2, "unknown visual method"),
        ([str(SCENE), QUESTION, "--method", "prism", "--keep", "many"], 2, "--keep must be"),
        ([str(SCENE), QUESTION, "--compression", "off"], 2, "every visual token is kept"),
        ([str(SCENE), QUESTION, "--compression", "{"], 2, "not JSON"),
        ([str(SCENE), QUESTION, "--compression", "turbo", "--keep", "4"], 2, "go with --method"),
        (["no-such.png", QUESTION, "--method", "prism"], 2, "no-such.png"),
        ([str(SCENE), QUESTION, "--method", "prism", "--model", "/no/such"], 1, "does not exist"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_an_exit_code(tmp_path, capsys, arguments, status, reason) -> None:
    assert run(*arguments, "--out", str(tmp_path / "p.png")) == status
    err = capsys.readouterr().err
    assert reason in err
    assert err.startswith("error: ")
