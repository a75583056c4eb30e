"""Random and uniform pruning, which every method is measured against."""

from __future__ import annotations

from prismserve.compression.apply import apply_visual
from prismserve.compression.loader import normalise, visual_method


def indices(name, features, keep):
    spec = normalise(visual_method(name), {"keep": keep}, "compression.visual")
    return apply_visual(features, spec)[1].tolist()


def test_random_depends_on_the_media_and_on_nothing_else(make_features):
    one = indices("random", make_features(196, seed=0, media=b"12345678"), 49)
    assert one == indices("random", make_features(196, seed=9, media=b"12345678"), 49)
    assert one != indices("random", make_features(196, seed=0, media=b"12345679"), 49)


def test_random_draws_what_it_has_always_drawn(make_features):
    drawn = indices("random", make_features(196, media=bytes(range(8))), 12)
    assert drawn == [4, 14, 31, 40, 41, 43, 85, 93, 103, 117, 141, 156]


def test_random_reaches_every_patch_about_equally_often(make_features):
    hits = [0] * 40
    for draw in range(400):
        for index in indices("random", make_features(40, media=draw.to_bytes(8, "big")), 10):
            hits[index] += 1
    assert min(hits) >= 60
    assert max(hits) <= 140


def test_uniform_takes_the_middle_of_equal_parts(make_features):
    assert indices("uniform", make_features(12), 4) == [1, 4, 7, 10]
    assert indices("uniform", make_features(10), 3) == [1, 5, 8]
    assert indices("uniform", make_features(7), 1) == [3]
