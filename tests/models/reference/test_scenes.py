from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from prismserve.models.reference import drawing
from prismserve.models.reference.questions import SceneObject, ask
from prismserve.models.reference.scenes import HELD_OUT_SEED, Scene, make_scene
from prismserve.models.reference.vocabulary import FAMILIES, GRID, IMAGE_TOKENS, SIZE, WORDS

SEEDS = (0, 1, 2, 3, HELD_OUT_SEED, HELD_OUT_SEED + 1, HELD_OUT_SEED + 2)


def questions_hash(seeds):
    return hashlib.sha256(json.dumps([make_scene(seed)[1] for seed in seeds]).encode()).hexdigest()


def kind_of(seed):
    return drawing.background_kind(np.random.default_rng([seed, 1]))


def test_questions_are_what_these_seeds_have_always_asked():
    assert questions_hash(SEEDS) == QUESTIONS_HASH
    assert questions_hash(range(HELD_OUT_SEED, HELD_OUT_SEED + 50)) == HELD_OUT_HASH


def test_plain_backgrounds_have_the_pixels_they_have_always_had():
    # Photographs depend on what is installed; glyphs and anti-aliasing on the version of Pillow, so pixels are compared
    # as 14 x 14 means.
    for seed, expected in GOLDEN_MEANS.items():
        assert kind_of(seed) != "photo"
        means = np.asarray(make_scene(seed)[0], np.float64).reshape(GRID, 16, GRID, 16, 3).mean((1, 3, 4))
        assert np.abs(means.mean(1) - expected).max() < 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_scene_is_a_pure_function_of_its_seed(seed):
    (first, asked), (second, again) = make_scene(seed), make_scene(seed)
    assert first.size == (SIZE, SIZE)
    assert first.mode == "RGB"
    assert first.tobytes() == second.tobytes()
    assert asked == again


def test_questions_do_not_depend_on_installed_photographs(monkeypatch):
    seeds = [seed for seed in range(40) if kind_of(seed) == "photo"]
    with_photos = [make_scene(seed)[1] for seed in seeds]
    monkeypatch.setattr(drawing, "photos", tuple)
    without = [make_scene(seed)[1] for seed in seeds]
    assert seeds
    assert with_photos == without


def test_every_family_is_asked_and_answers_agree_with_the_objects():
    seen = set()
    for seed in range(60):
        scene = Scene(seed)
        names = [o.name for o in scene.objects]
        for family, question, answer in scene.questions():
            seen.add(family)
            assert question
            assert answer
            if family == "exist":
                assert (answer == "yes") == any(f" {name}" in question for name in names)
            elif family in ("number", "word"):
                assert answer == scene.text
            elif family == "color":
                assert answer in {o.color for o in scene.objects}
    assert seen == set(FAMILIES)


def test_shapes_do_not_overlap_and_stay_inside():
    for seed in range(40):
        scene = Scene(seed)
        for left, top, right, bottom in scene._boxes:
            assert min(left, top) >= 0
            assert max(right, bottom) <= SIZE
        for i, a in enumerate(scene._boxes):
            for b in scene._boxes[:i]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_labels_name_the_patches_of_shapes_and_glyphs():
    for seed in range(20):
        scene = Scene(seed)
        labels = scene.labels()
        assert all(v.shape == (IMAGE_TOKENS,) and v.dtype == np.int64 for v in labels.values())
        assert labels["center"].sum() <= len(scene.objects)
        assert ((labels["shape"] > 0) == (labels["color"] > 0)).all()
        assert labels["index"].max() == len(scene.text)
        assert labels["row"].min() == labels["col"].min() == 1


def test_relations_and_positions_follow_the_coordinates():
    objects = [SceneObject("circle", "red", "small", 30, 30), SceneObject("star", "blue", "large", 180, 170)]
    answers = {}
    for family, question, answer in ask(np.random.default_rng(0), objects, "", ""):
        answers.setdefault(family, []).append((question, answer))
    for question, answer in answers["position"]:
        assert answer == ("top left" if "red circle" in question else "bottom right")
    for question, answer in answers["relation"]:
        circle_first = question.index("red circle") < question.index("blue star")
        relative = question.startswith("Relative")
        assert (answer in {"left", "above"}) == (circle_first != relative)
    assert answers["caption"][0][1] == "a red circle and a blue star"


def test_there_are_sixty_different_words():
    assert len(set(WORDS)) == len(WORDS) == 60


QUESTIONS_HASH = "3f29b0179975df7a204d1656e17c70e466cd59aef75f18ea5973ed917425be5b"
HELD_OUT_HASH = "b34c3e2f17114990153f526ff57f326dd763fa98f7aa81b928799989f28a14c5"
GOLDEN_MEANS = {
    1: [117.8, 119.4, 119.1, 116.7, 116.7, 119.4, 122.9, 119.9, 118.4, 119.4, 89.0, 92.8, 118.3, 119.8],
    3: [117.6, 114.4, 113.7, 116.7, 117.6, 127.3, 117.8, 109.6, 109.3, 112.8, 115.6, 117.5, 114.2, 113.9],
    6: [137.0, 134.6, 132.9, 131.2, 134.2, 139.3, 139.9, 133.5, 136.0, 139.7, 135.2, 136.4, 135.9, 135.4],
    8: [161.3, 162.5, 155.9, 161.7, 166.3, 167.6, 169.0, 170.4, 171.8, 173.2, 167.4, 173.7, 177.0, 178.2],
    10000001: [175.5, 168.0, 160.4, 173.9, 167.1, 176.6, 178.0, 176.2, 173.8, 165.8, 170.5, 169.8, 180.0, 181.0],
}
"""Mean brightness of each of the 14 rows of patches."""
