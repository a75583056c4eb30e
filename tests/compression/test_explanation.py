"""Fates of tokens: from plans to stages, to characters and to a picture."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image

from prismserve.compression.base import VisualPlan
from prismserve.compression.cuts import Cut, CutPlan, Grid
from prismserve.compression.explanation import (
    DROPPED,
    GONE,
    Explanation,
    Medium,
    Stage,
    cut_stages,
    patch_map,
    visual_stage,
)
from prismserve.compression.overlay import GAP_PX, PANEL_PX, ROWS_MAX, STAGES_MAX, TEXT_PX, draw


def explained(*stages, grid=None):
    grid = grid or Grid(1, 2, 3)
    return Explanation((Medium(grid, (0.0, 0.0, 60.0, 40.0)),), stages)


def test_a_token_without_a_share_in_a_survivor_is_dropped_and_the_largest_share_says_where_it_went():
    weights = torch.tensor([[1.0, 0.2, 0.0, 0.0], [0.0, 0.3, 0.0, 1.0]])
    plans = [VisualPlan(torch.tensor([0, 3]), weights), VisualPlan(torch.tensor([1]))]
    stage = visual_stage("m", plans, [4, 2])
    assert stage.fates == (0, 3, DROPPED, 3, DROPPED, 5)
    assert (stage.kept, stage.merged, stage.dropped) == (3, 1, 2)
    assert stage.title == "m, before the decoder"


def test_cuts_speak_of_places_whatever_has_left_before_them():
    first = CutPlan(torch.tensor([0, 2, 3]), torch.tensor([0, -1, 1, 2, 1]), torch.ones(5))
    second = CutPlan(torch.tensor([1]))
    before = (0, 1, DROPPED, 3, 4, 5)
    stages = cut_stages("m", [Cut(2), Cut(5)], [first, second], before)
    assert stages[0].fates == (0, DROPPED, GONE, 3, 4, 3)
    assert stages[1].fates == (DROPPED, GONE, GONE, 3, DROPPED, GONE)
    assert [stage.layer for stage in stages] == [2, 5]
    assert [stage.kept for stage in stages] == [3, 1]


def test_the_map_of_one_stage_tells_merged_from_dropped_and_of_several_when_a_token_left():
    one = Stage("visual", "m", None, (0, 0, DROPPED, 3, 4, 3))
    assert patch_map(explained(one)) == ["# + .", "# # +"]
    two = Stage("prefill", "n", 2, (0, GONE, GONE, DROPPED, 4, GONE))
    assert patch_map(explained(one, two)) == ["# 1 1", "2 # 1"]
    assert patch_map(explained(one), columns_max=2) == []


def test_every_fate_has_its_look_and_kept_patches_show_the_picture():
    stage = Stage("visual", "m", None, (0, 0, DROPPED, GONE, 4, 4))
    sheet = draw(explained(stage), [[Image.new("RGB", (60, 40), (200, 100, 50))]])
    left, top, side = 2 * GAP_PX + PANEL_PX, GAP_PX + TEXT_PX, PANEL_PX // 3
    middles = [sheet.getpixel((left + side * (p % 3) + 30, top + side * (p // 3) + 30)) for p in range(6)]
    assert middles[0] == middles[4] == (200, 100, 50)
    blue, red, grey = middles[1], middles[2], middles[3]
    assert blue[2] > blue[0]
    assert red[0] > 2 * red[2]
    assert max(grey) - min(grey) <= 1


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_what_goes_on_stands_out_on_dark_and_light_pictures(shade):
    stage = Stage("prefill", "m", 3, (0, DROPPED, GONE, 3, DROPPED, GONE))
    sheet = draw(explained(stage), [[Image.new("RGB", (60, 40), (shade, shade, shade))]])
    left, top, side = 2 * GAP_PX + PANEL_PX, GAP_PX + TEXT_PX, PANEL_PX // 3
    looks = [sheet.getpixel((left + side * place + 90, top + 30)) for place in range(3)]
    looks.append(sheet.getpixel((left, top + 30)))
    # The frame and every two fates differ by more than a fifth of the range in some channel.
    for one, other in itertools.combinations(looks, 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 25, looks


def test_the_legend_names_what_is_in_the_picture_and_nothing_else():
    picture = [[Image.new("RGB", (60, 40), (255, 255, 255))]]
    dropped = draw(explained(Stage("prefill", "m", 3, (0, DROPPED, 2, 3, 4, 5))), picture)
    merged = draw(explained(Stage("visual", "m", None, (0, 0, 2, 3, 4, 5))), picture)

    def legend(sheet):
        return {
            colour for _, colour in sheet.crop((0, sheet.height - 26, sheet.width, sheet.height)).getcolors(1 << 16)
        }

    red, blue = (190, 30, 30), (40, 110, 235)
    assert red in legend(dropped)
    assert blue not in legend(dropped)
    assert blue in legend(merged)
    assert red not in legend(merged)


def test_the_picture_has_the_part_that_the_model_sees_and_black_where_it_pads():
    picture = Image.new("RGB", (60, 40), (255, 255, 255))
    grid = Grid(1, 2, 2)
    seen = Explanation((Medium(grid, (10.0, -10.0, 50.0, 30.0)),), (Stage("visual", "m", None, (0, 1, 2, 3)),))
    sheet = draw(seen, [[picture]])
    assert sheet.getpixel((100, TEXT_PX + GAP_PX + 20)) == (0, 0, 0)
    assert sheet.getpixel((100, TEXT_PX + GAP_PX + 300)) == (255, 255, 255)


def test_pictures_are_bounded_however_many_frames_and_stages_there_are():
    grid = Grid(20, 1, 2)
    stages = [Stage("prefill", "m", number, tuple(range(40))) for number in range(30)]
    clip = [Image.new("RGB", (8, 4), (number * 12, 0, 0)) for number in range(20)]
    sheet = draw(explained(*stages, grid=grid), [clip])
    assert sheet.width <= (PANEL_PX + GAP_PX) * (1 + STAGES_MAX) + GAP_PX
    assert sheet.height <= ROWS_MAX * (2 * PANEL_PX + TEXT_PX + GAP_PX) + 60
