from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import pixels


def test_differences_are_told_in_steps_of_the_samples():
    ours = torch.zeros(3, 4, 4)
    theirs = ours.clone()
    theirs[0, 0, 0] = 1 / 255 / 0.5
    found = pixels.gap({"pixel_values": ours}, {"pixel_values_videos": theirs}, std=0.5)
    assert found.largest == pytest.approx(1.0)
    assert found.mean == pytest.approx(1 / 48)
    assert pixels.worst([found, pixels.Gap(2.0, 0.0)]) == ("2.0", "0.010")


def test_another_number_of_samples_is_no_small_difference():
    found = pixels.gap({"pixel_values": torch.zeros(3)}, {"pixel_values": torch.zeros(6)}, std=1.0)
    assert found.largest == float("inf")


@pytest.mark.skipif(pixels.is_torchvision_available(), reason="says what is missing where torchvision is")
def test_without_torchvision_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pixels"])
    assert pixels.main() == 2
    assert "torchvision is not installed" in capsys.readouterr().err
