from __future__ import annotations

import argparse
import json

import grpc
import pytest

from prismserve.cluster.commands import presets
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


def test_a_refusal_is_one_sentence_and_exit_code_2(server, capsys) -> None:
    server.service.failures.append(Failure(grpc.StatusCode.INVALID_ARGUMENT, "preset: 'off' cannot step back"))
    assert run(server, "--hold", "off") == 2
    assert "cannot step back" in capsys.readouterr().err
