"""What the pages tell a reader to type, open or expect is there."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from prismserve.compression import loader, presets
from prismserve.models.reference.scenes import make_scene

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text()
SCENE = 10_000_009


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.MULTILINE)) <= targets


def test_files_that_the_architecture_names_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = re.findall(r"`([a-z_]+/[a-z_/]*[a-z_]+\.py)`", text)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / "prismserve" / name).is_file()] == []


def test_the_picture_of_the_readme_is_a_scene_that_answers_as_it_says():
    image, questions = make_scene(SCENE)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    assert (ROOT / "docs" / "assets" / "scene.png").read_bytes() == stream.getvalue()
    (answer,) = [answer for family, question, answer in questions if question == "What is in the image?"]
    assert f'"{answer}"' in README


def test_the_request_of_the_readme_is_json_with_a_known_plan():
    (body,) = re.findall(r"<<BODY\n(.*?)\nBODY\n", README, re.DOTALL)
    request = json.loads(body.replace("$IMAGE", "AAAA"))
    plan = presets.resolve(request["compression"], "off")
    assert (plan.visual.name, plan.wire.name) == ("visionzip", "int8")


def test_the_readme_lists_every_preset_and_method():
    for name in (*presets.names(), *loader.names("visual"), *loader.names("codec")):
        assert f"`{name}`" in README, name
