from __future__ import annotations

import argparse
import json

import grpc
import pytest

from prismserve.cluster.commands import presets
from prismserve.compression.presets_table import FAMILIES, described
from tests.client.conftest import TURBO, Failure


def run(server, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    presets.add_arguments(parser)
    return presets.run(parser.parse_args([*arguments, "--grpc", server.target]))


@pytest.mark.parametrize("control", ["hold", "release", "auto"])
def test_an_operators_word_is_passed_on_and_the_states_are_shown(server, capsys, control) -> None:
    assert run(server, f"--{control}", "turbo") == 0
    assert server.service.presets == [("turbo", control)]
    out = capsys.readouterr().out
    for part in ("turbo", "balanced", "auto", "0 of 3", "25 %", "61 s", "12 of 20 answers differ"):
        assert part in out


def test_without_a_word_the_states_are_those_of_the_status_document(server, capsys) -> None:
    server.service.status = json.dumps({"workers": [], "fidelity": {"presets": {"turbo": TURBO}}})
    assert run(server, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"presets": {"turbo": TURBO}}
    assert server.service.presets == []


def test_what_presets_stand_for_on_the_served_model_is_shown(server, capsys) -> None:
    states = {name: {**TURBO, "stands_for": told} for name, told in described("llava_onevision").items()}
    server.service.status = json.dumps({"workers": [], "fidelity": {"presets": states}})
    assert run(server) == 0
    out = capsys.readouterr().out
    for part in ("on this model", "salience 12.5 %, int8", "8.9 points (count 31, caption 21)", "not measured"):
        assert part in out


def test_every_family_is_shown_without_a_cluster(capsys) -> None:
    parser = argparse.ArgumentParser()
    presets.add_arguments(parser)
    nobody = ["--grpc", "127.0.0.1:1", "--families"]
    assert presets.run(parser.parse_args(nobody)) == 0
    out = capsys.readouterr().out
    for entry in FAMILIES.values():
        assert entry.title in out
    assert "visionzip 25 %, int8" in out
    assert "0.9 points (count 6, relation 2)" in out
    assert out.count("measured on the bundled model") == 1
    assert presets.run(parser.parse_args([*nobody, "--json"])) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["qwen_vl"]["presets"]["balanced"]["videos"] == "dpp 25 %, int8"


def test_a_refusal_is_one_sentence_and_exit_code_2(server, capsys) -> None:
    server.service.failures.append(Failure(grpc.StatusCode.INVALID_ARGUMENT, "preset: 'off' cannot step back"))
    assert run(server, "--hold", "off") == 2
    assert "cannot step back" in capsys.readouterr().err
