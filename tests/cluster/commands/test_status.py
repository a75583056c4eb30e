from __future__ import annotations

import argparse
import json

from prismserve.cluster.commands import status
from tests.client.conftest import TURBO, WORKER


def run(server, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    return status.run(parser.parse_args([*arguments, "--grpc", server.target]))


def test_json_is_the_document_with_every_worker(server, capsys) -> None:
    assert run(server, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"workers": [WORKER]}


def test_the_table_shows_pools_and_every_worker(server, capsys) -> None:
    assert run(server) == 0
    out = capsys.readouterr().out
    for part in ("1 of 1 ready", "decode-1", "4321", "node-a", "ready", "25 %"):
        assert part in out


def test_names_from_the_cluster_are_not_markup(server, capsys) -> None:
    server.service.status = json.dumps({"workers": [{**WORKER, "id": "[bold]x[/]\u001b[2J"}]})
    assert run(server) == 0
    assert "[bold]x[/][2J" in capsys.readouterr().out


def test_no_worker_is_no_error(server) -> None:
    server.service.status = json.dumps({"workers": []})
    assert run(server) == 0


def test_without_a_cluster_the_exit_code_is_3(server, capsys) -> None:
    server.stop()
    assert run(server, "--timeout-s", "2") == 3
    assert "no cluster answers" in capsys.readouterr().err


def test_presets_that_stepped_back_are_shown_with_the_reason(server, capsys) -> None:
    server.service.status = json.dumps({"workers": [WORKER], "fidelity": {"presets": {"turbo": TURBO}}})
    assert run(server) == 0
    out = capsys.readouterr().out
    for part in ("turbo", "balanced", "12 of 20 answers differ, the bound is 0.25"):
        assert part in out
