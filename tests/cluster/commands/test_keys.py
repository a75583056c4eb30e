from __future__ import annotations

import argparse

import yaml

from prismserve.cluster.commands import keys
from prismserve.cluster.settings import Settings, read_tenants
from prismserve.router.tenants import Tenants


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    keys.add_arguments(parser)
    return keys.run(parser.parse_args(arguments))


def test_what_it_prints_is_a_key_and_a_file_that_knows_it(capsys, tmp_path) -> None:
    assert run("acme") == 0
    printed = capsys.readouterr()
    key = printed.out.strip()
    assert key not in printed.err
    file = tmp_path / "keys.yaml"
    file.write_text(printed.err)
    tenants = Tenants(read_tenants(Settings(api_keys=str(file))))
    assert tenants.authenticate(f"Bearer {key}").name == "acme"
    assert yaml.safe_load(printed.err)["tenants"][0]["name"] == "acme"


def test_a_name_that_is_none_is_refused(capsys) -> None:
    assert run("two words") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "tenants.0.name" in printed.err
