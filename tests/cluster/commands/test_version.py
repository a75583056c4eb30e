from __future__ import annotations

import argparse
import json

import prismserve
from prismserve.cluster.commands import version


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    version.add_arguments(parser)
    return version.run(parser.parse_args(arguments))


def test_it_prints_this_version_and_those_it_stands_on(capsys) -> None:
    assert run() == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert lines["prismserve"] == prismserve.__version__
    assert {"python", "ray", "torch"} <= set(lines)


def test_json_holds_the_same(capsys) -> None:
    assert run("--json") == 0
    assert json.loads(capsys.readouterr().out) == version.versions()
