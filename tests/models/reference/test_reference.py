"""The bundled files: present, small, and the model the README describes."""

from __future__ import annotations

import json

import pytest

from prismserve.core.errors import ModelLoadError
from prismserve.models import reference
from prismserve.models.reference import reference_path
from prismserve.models.reference.build import CHAT_TEMPLATE, SPECIAL_TOKENS

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_every_file_of_the_checkpoint_is_there_and_under_15_megabytes():
    files = {path.name: path.stat().st_size for path in reference_path().iterdir()}
    assert set(files) >= FILES
    assert sum(files.values()) < 15_000_000


def test_the_bundled_processor_is_what_the_build_makes():
    directory = reference_path()
    assert (directory / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    assert tuple(token["content"] for token in sorted(added, key=lambda t: t["id"])) == SPECIAL_TOKENS


def test_missing_package_data_is_one_clear_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(reference.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(ModelLoadError, match="reinstall prismserve"):
        reference_path()
