"""The committed protocol stubs are what the schemas generate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = ROOT / "prismserve" / "protocol"


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("protocol")
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "generate_protocol.py"), str(folder)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return folder


def test_every_schema_has_its_three_stubs(generated):
    expected = {
        f"{schema.stem}_pb2{ending}"
        for schema in (PROTOCOL / "schema").glob("*.proto")
        for ending in (".py", ".pyi", "_grpc.py")
    }
    assert expected
    assert {path.name for path in generated.iterdir()} == expected


def test_committed_stubs_equal_generated_ones(generated):
    stale = [
        path.name
        for path in sorted(generated.iterdir())
        if not (PROTOCOL / path.name).is_file() or (PROTOCOL / path.name).read_bytes() != path.read_bytes()
    ]
    assert not stale, f"run `make proto`: {stale} differ from what the schemas generate"


def test_no_stub_outlives_its_schema(generated):
    committed = {path.name for path in PROTOCOL.glob("*_pb2*")}
    assert committed == {path.name for path in generated.iterdir()}
