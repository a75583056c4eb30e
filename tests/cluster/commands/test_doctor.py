from __future__ import annotations

import argparse
import json
import socket

from prismserve.cluster.commands import doctor


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(arguments))


def test_a_machine_that_can_serve_passes_every_check(capsys) -> None:
    assert run("--json", "--port", "0", "--grpc-port", "0") == 0
    results = json.loads(capsys.readouterr().out)
    assert {"gpu", "nixl", "redis", "ray", "model", "memory"} <= {result["name"] for result in results}
    assert all(result["ok"] for result in results)


def test_what_is_wrong_is_shown_with_what_to_do(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        assert run("--port", port, "--grpc-port", "0", "--model", "/no/such/model") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "2 of" in out
    assert "checks failed" in out
    assert "--port" in out


def test_wrong_settings_are_told_in_one_sentence(capsys) -> None:
    assert run("--decode-replicas", "-1") == 2
    assert "decode_replicas" in capsys.readouterr().err
