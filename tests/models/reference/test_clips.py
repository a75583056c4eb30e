from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from prismserve.models.reference import drawing
from prismserve.models.reference.clip_data import Asker, Watched, labels
from prismserve.models.reference.clip_questions import CLIP_FAMILIES, STATIC_FAMILIES, Actor, ask, drill
from prismserve.models.reference.clip_stage import VALIDATION_SEED, ClipOptions, richest
from prismserve.models.reference.clips import FRAMES, HELD_OUT_SEED, SIDE, TOKENS, Clip, make_clip
from prismserve.models.reference.scenes import make_scene
from prismserve.models.reference.vocabulary import COLOR_NAMES, COLORS, SHAPES, SIZE

SEEDS = (0, 1, 2, HELD_OUT_SEED, HELD_OUT_SEED + 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_clip_is_a_pure_function_of_its_seed(seed):
    (frames, asked), (again, repeated) = make_clip(seed), make_clip(seed)
    assert frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert frames.dtype == np.uint8
    assert frames.tobytes() == again.tobytes()
    assert asked == repeated


def test_clips_differ_from_each_other_and_from_the_scenes_of_their_seeds():
    clips = [make_clip(seed)[0] for seed in SEEDS]
    assert len({frames.tobytes() for frames in clips}) == len(SEEDS)
    for seed, frames in zip(SEEDS, clips, strict=True):
        scene = np.asarray(make_scene(seed)[0])
        assert all(np.abs(frame.astype(int) - scene).mean() > 2 for frame in frames)


def test_questions_are_what_these_seeds_have_always_asked():
    text = json.dumps([make_clip(seed)[1] for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 10)])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "732a13f9055f5f10874202ff0fb1d0851a8d14d19bbb06c955d9d0b876076b91"
    )


def test_questions_do_not_depend_on_installed_photographs(monkeypatch):
    before = [make_clip(seed)[1] for seed in range(12)]
    monkeypatch.setattr(drawing, "photos", tuple)
    assert [make_clip(seed)[1] for seed in range(12)] == before


def test_training_never_meets_validation_or_held_out_clips():
    options = ClipOptions()
    assert options.seeds(options.steps * options.fresh).stop <= VALIDATION_SEED
    assert VALIDATION_SEED + options.validation_clips <= HELD_OUT_SEED


def test_answers_agree_with_the_tracks():
    asked = set()
    for seed in range(40):
        clip = Clip(seed)
        by_name = {actor.name: actor for actor in clip.actors}
        assert len(by_name) == len(clip.actors)
        for family, question, answer in clip.questions():
            asked.add(family)
            named = [actor for name, actor in by_name.items() if name in question]
            if family == "count":
                assert answer == str(len(clip.actors))
            elif family == "direction":
                assert answer == named[0].direction
            elif family == "frames":
                assert answer == str(sum(named[0].seen))
            elif family == "when":
                assert answer == named[0].part
            elif family == "exist":
                assert (answer == "yes") == bool(named)
            elif family == "order":
                edge = max if "last" in question else min
                assert by_name[answer].onset == edge(actor.onset for actor in clip.actors)
            else:
                assert family in STATIC_FAMILIES
                other = "shape" if family == "color" else "color"
                told = [one for one in clip.actors if getattr(one, other) in question]
                assert [(getattr(one, family), all(one.seen)) for one in told] == [(answer, True)]
    assert asked == set(CLIP_FAMILIES)


@pytest.mark.parametrize(
    ("seen", "part"),
    [("1000", "start"), ("0100", "middle"), ("0110", "middle"), ("0001", "end"), ("1100", ""), ("0011", "")],
)
def test_part_is_where_alone_a_shape_is_seen(seen, part):
    assert Actor("circle", "red", tuple(c == "1" for c in seen), "").part == part


def test_a_shape_that_comes_back_is_counted_once():
    actors = [Actor("circle", "red", (True, False, True, False), ""), Actor("star", "blue", (True,) * 4, "up")]
    asked = {(family, answer) for family, _, answer in ask(np.random.default_rng(0), actors)}
    assert {("count", "2"), ("frames", "2"), ("frames", "4"), ("direction", "up")} <= asked


def test_pixels_and_labels_show_the_same_shapes():
    for seed in range(8):
        clip = Clip(seed)
        truth = {name: value.reshape(FRAMES, SIDE, SIDE) for name, value in labels(clip).items()}
        shown = clip.foreground().reshape(FRAMES, SIDE, SIDE)
        assert ((truth["shape"] > 0) == shown).all()
        assert ((truth["seen"] > 0) == shown).all()
        assert (truth["frame"] == np.arange(FRAMES)[:, None, None]).all()
        for index, actor in enumerate(clip.actors):
            for frame in range(FRAMES):
                owned = clip.owner[frame] == index + 1
                assert owned.any() == actor.seen[frame]
                if actor.seen[frame]:
                    ink = clip.frames[frame][owned].astype(float).mean(0)
                    assert np.abs(ink - COLORS[actor.color]).max() < 30
                    cells = (truth["shape"][frame] == SHAPES.index(actor.shape) + 1) & (
                        truth["color"][frame] == COLOR_NAMES.index(actor.color) + 1
                    )
                    assert cells.any()
                    assert set(truth["seen"][frame][cells]) == {1 + sum(actor.seen[:frame])}


def test_a_moving_shape_goes_where_its_direction_says():
    met = set()
    for seed in range(60):
        clip = Clip(seed)
        for index, actor in enumerate(clip.actors):
            centers = [np.argwhere(clip.owner[f] == index + 1).mean(0) for f in np.flatnonzero(actor.seen)]
            steps = np.diff(centers, axis=0)
            if not actor.direction:
                assert not len(steps) or np.abs(steps).max() < 1e-6
                continue
            met.add(actor.direction)
            axis, sign = {"up": (0, -1), "down": (0, 1), "left": (1, -1), "right": (1, 1)}[actor.direction]
            assert (sign * steps[:, axis] > 23.9).all()
            assert np.abs(steps[:, 1 - axis]).max() < 1e-6
    assert met == {"up", "down", "left", "right"}


def test_what_stands_still_is_nearly_the_same_in_every_frame_but_never_equal():
    clip = Clip(HELD_OUT_SEED)
    still = (clip.owner == 0).all(0)
    first, second = (clip.frames[i][still].astype(int) for i in (0, 1))
    assert 0 < np.abs(first - second).mean() < 12


class Letters:
    """A tokenizer of every fourth letter."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [8 + ord(letter) % 64 for letter in text[::4]]


def watched(seed):
    clip = Clip(seed)
    truth = {name: torch.from_numpy(value) for name, value in labels(clip).items()}
    return Watched(torch.arange(TOKENS + 1.0)[:, None].expand(-1, 4), truth, clip.actors)


@pytest.mark.parametrize("visible", [80, TOKENS])
def test_a_batch_shows_every_shape_at_its_place_and_background_while_there_is_room(visible):
    clips = [watched(seed) for seed in (HELD_OUT_SEED, HELD_OUT_SEED + 1)]
    batch = Asker(Letters()).ask_about(clips, visible, np.random.default_rng(0), single=True)
    assert batch.tokens.shape == (2, visible + 1, 4)
    assert batch.ids.shape == batch.targets.shape == (2, Asker.text_tokens)
    assert min(len(spans) for spans in batch.spans) >= 4
    assert (batch.places.diff(dim=1) > 0).all()
    assert (batch.tokens[:, :-1, 0].long() == batch.places).all()
    assert (batch.tokens[:, -1, 0] == TOKENS).all()
    for row, clip in enumerate(clips):
        for name, truth in clip.labels.items():
            assert (batch.labels[name][row] == truth[batch.places[row]]).all()
        assert (batch.labels["shape"][row] > 0).sum() == (clip.labels["shape"] > 0).sum() < visible


def test_no_new_clip_of_training_is_another_one_again():
    options = ClipOptions()
    seeds = [seed for index in range(20) for seed in options.seeds(index)]
    assert len(set(seeds)) == len(seeds)
    assert {len(options.seeds(index)) for index in range(20)} == {1, options.choice}


def test_what_is_learnt_last_is_asked_of_every_shape_in_every_wording():
    seen = [(True, False, False, False), (False, True, False, False), (True,) * 4, (False, False, False, True)]
    names = [("circle", "red"), ("star", "blue"), ("ring", "green"), ("heart", "pink")]
    actors = [Actor(*name, there, "") for name, there in zip(names, seen, strict=True)]
    asked = drill([*actors, Actor("cross", "gray", (True,) * 4, "down")])
    for family, answer in [("when", "start"), ("when", "middle"), ("when", "end"), ("direction", "down")]:
        mine = [(question, told) for kind, question, told in asked if (kind, told) == (family, answer)]
        assert len(set(mine)) == 2
    assert {(question, answer) for family, question, answer in asked if family == "order"} == {
        ("Which object is last?", "pink heart"),
        ("What do you see last?", "pink heart"),
    }


def test_answers_of_the_drill_agree_with_the_questions_of_the_clip():
    for seed in range(40):
        clip = Clip(seed)
        told = {(family, question): answer for family, question, answer in drill(clip.actors)}
        asked = [q for q in clip.questions() if q[0] in {"order", "when", "direction"}]
        assert all(told[family, question] == answer for family, question, answer in asked)


def test_the_richest_clip_is_asked_most_different_things():
    def variety(clip):
        return len({(family, answer) for family, _, answer in drill(clip.actors)})

    seeds = range(50, 56)
    assert variety(richest(seeds)) == max(variety(Clip(seed)) for seed in seeds) > variety(Clip(seeds.start))
    assert (richest(range(51, 52)).frames == Clip(51).frames).all()


def test_a_drilled_row_has_more_about_time_and_still_fits():
    clips = [watched(seed) for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 8)]

    def hard(drilled):
        batch = Asker(Letters()).ask_about(clips, 80, np.random.default_rng(0), single=True, drilled=drilled)
        assert batch.ids.shape == (len(clips), Asker.text_tokens)
        return sum(family in Asker.first for spans in batch.spans for family, _, _ in spans)

    assert hard(1.0) > hard(0.5) > hard(0.0) > 0


def test_a_clip_is_asked_in_other_ways_when_it_comes_again():
    clip = [watched(HELD_OUT_SEED)]
    first, again, other = (
        Asker(Letters()).ask_about(clip, 80, np.random.default_rng(seed), single=False).ids for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
