"""What is published is complete: the wheel that comes out of the sdist has everything, and only ours."""

from __future__ import annotations

import configparser
import email
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prismserve

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "prismserve"
WHEEL_BYTES_MAX = 15_000_000
CHECKPOINT = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def source_files() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


@pytest.fixture(scope="module")
def metadata(installed):
    (folder,) = installed.glob("prismserve-*.dist-info")
    return folder


def test_the_wheel_has_one_top_level_name(installed, metadata):
    assert {path.name for path in installed.iterdir()} == {"prismserve", metadata.name}


def test_the_wheel_holds_every_file_of_the_package(installed):
    # The tree may be edited while this runs; what was there before and after must be in the wheel.
    packed = {str(path.relative_to(installed)) for path in (installed / "prismserve").rglob("*") if path.is_file()}
    assert source_files() - packed == set()
    assert not [path for path in packed if "__pycache__" in path or path.endswith(".pyc")]


def test_every_package_of_the_tree_is_a_regular_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_holds_the_reference_checkpoint_and_the_schemas(installed):
    weights = installed / "prismserve" / "models" / "reference" / "weights"
    assert {path.name for path in weights.iterdir()} == CHECKPOINT
    schemas = installed / "prismserve" / "protocol" / "schema"
    assert {path.name for path in schemas.iterdir()} == {"prismserve.proto", "worker.proto"}
    assert (installed / "prismserve" / "py.typed").is_file()


def test_the_wheel_is_smaller_than_fifteen_megabytes(wheel):
    assert wheel.stat().st_size < WHEEL_BYTES_MAX


def test_the_wheel_is_pure_python_and_carries_its_licence(wheel, metadata):
    assert wheel.name == f"prismserve-{prismserve.__version__}-py3-none-any.whl"
    assert "Apache License" in (metadata / "licenses" / "LICENSE").read_text()


def test_the_command_is_declared(metadata):
    entries = configparser.ConfigParser()
    entries.read(metadata / "entry_points.txt")
    assert dict(entries["console_scripts"]) == {"prismserve": "prismserve.cluster.cli:main"}


def test_the_metadata_names_version_extras_and_no_address_to_install_from(metadata):
    message = email.message_from_string((metadata / "METADATA").read_text())
    assert message["Version"] == prismserve.__version__
    assert message["License-Expression"] == "Apache-2.0"
    assert set(message.get_all("Provides-Extra")) >= {"gpu", "test", "bench", "dev"}
    requirements = [Requirement(line) for line in message.get_all("Requires-Dist")]
    assert [str(requirement) for requirement in requirements if requirement.url] == []


def test_the_sdist_holds_what_is_needed_to_test_and_build_it(unpacked_sdist):
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "scripts/generate_protocol.py", "tests/conftest.py"):
        assert (unpacked_sdist / name).is_file(), name
    assert not (unpacked_sdist / ".venv").exists()


def test_constraints_pin_every_requirement_exactly_and_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9][a-z0-9-]*)==([0-9][0-9a-z.!]*)", line)
        assert match, f"{line!r} is not NAME==VERSION without a local label"
        pins[match[1]] = match[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = [Requirement(line) for line in lines]
    assert len(declared) > 30
    unpinned_on_purpose = {
        "flash-attn",
        "nvidia-cufile-cu12",
        "triton",
    }  # extra gpu: they follow the CUDA build of torch
    for requirement in declared:
        if requirement.name not in unpinned_on_purpose:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_reference_model_is_found_in_an_installed_package(installed, tmp_path):
    code = "from prismserve.models.reference import reference_path; print(reference_path())"
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(installed)
