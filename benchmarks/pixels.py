"""Our pixels beside those of transformers' processors that need torchvision, the default where it is installed.

Workers prepare images with Pillow, so that pixels do not depend on what else is installed. Run
``python -m benchmarks.pixels`` where torchvision can be imported beside the project's own packages. For each family: the
largest and the mean difference of a sample, in steps of the 8 bits it came from, and how many of the answers, and of
their greedy tokens, differ when the engine is given torchvision's pixels instead. The checkpoints are the small random
ones of the tests, so the last two say how often a difference in pixels can be seen at all, not what it costs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import (
    VIDEO_PROCESSOR_MAPPING_NAMES,
    video_processor_class_from_name,
)
from transformers.utils.import_utils import is_torchvision_available
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from transformers.video_utils import VideoMetadata

from benchmarks.tables import markdown_table
from prismserve.models.images import CheckpointTools
from tests.models.matching import Case, Clip, Ours, clip, picture
from tests.models.zoo import SEEING, SPECIMENS

if TYPE_CHECKING:
    from collections.abc import Mapping

_SIZES = ((640, 360), (333, 500), (70, 40), (32, 32))
_TOKENS = 64
_PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class Gap:
    """Differences of samples in 8-bit steps: the largest, and the mean."""

    largest: float
    mean: float


def gap(ours: Mapping[str, Any], theirs: Mapping[str, Any], std: float) -> Gap:
    """How far apart two processors' pixels are."""
    mine, other = (next(item[name] for name in _PIXELS if name in item) for item in (ours, theirs))
    mine, other = (torch.as_tensor(item).flatten() for item in (mine, other))
    if mine.shape != other.shape:
        return Gap(float("inf"), float("inf"))
    steps = (mine - other).abs() * std * 255
    return Gap(steps.max().item(), steps.mean().item())


def worst(gaps: list[Gap]) -> tuple[str, str]:
    """The largest difference of all, and the mean of means."""
    return f"{max(g.largest for g in gaps):.1f}", f"{sum(g.mean for g in gaps) / len(gaps):.3f}"


def images(ours: Ours, directory: Path) -> tuple[str, ...]:
    """Table cells about images: differences, answers, tokens."""
    fast = AutoImageProcessor.from_pretrained(directory, local_files_only=True, backend="torchvision")
    std = max(fast.image_std)
    cases = {
        f"{width} x {height}": Case("What is in the picture?", (picture(width, width, height),))
        for width, height in _SIZES
    }
    answers = ours.run([ours.request(name, case, _TOKENS) for name, case in cases.items()])
    with mock.patch.object(CheckpointTools, "image_processor", fast):
        theirs = Ours(directory)
        others = theirs.run([theirs.request(name, case, _TOKENS) for name, case in cases.items()])
        read = [theirs.processor.preprocess(case.images[0]) for case in cases.values()]
    gaps = [
        gap(ours.processor.preprocess(case.images[0]).tensors, other.tensors, std)
        for case, other in zip(cases.values(), read, strict=True)
    ]
    answered = sum(answers[name] != others[name] for name in cases)
    tokens = sum(a != b for name in cases for a, b in zip(answers[name], others[name], strict=True))
    return *worst(gaps), f"{answered} of {len(cases)}", f"{tokens} of {_TOKENS * len(cases)}"


def videos(ours: Ours, directory: Path) -> tuple[str, ...]:
    """Table cells about videos: differences."""
    # By the model's type: the tests' checkpoints do not name their video processor.
    kind = AutoConfig.from_pretrained(directory, local_files_only=True).model_type
    fast = video_processor_class_from_name(VIDEO_PROCESSOR_MAPPING_NAMES[kind]["torchvision"]).from_pretrained(
        directory
    )
    clips = [clip(index, width, height, (0, 3, 9, 20)) for index, (width, height) in enumerate(_SIZES)]
    gaps = [
        gap(ours.processor.preprocess_video(item.frames, item.times).tensors, _fast(fast, item), max(fast.image_std))
        for item in clips
    ]
    return worst(gaps)


def _fast(processor: Any, item: Clip) -> Mapping[str, Any]:
    metadata = VideoMetadata(total_num_frames=item.total, fps=item.fps, frames_indices=list(item.indices))
    frames = torch.from_numpy(item.frames).permute(0, 3, 1, 2)
    result: Mapping[str, Any] = processor(
        videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    return result


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=SEEING, help="only this one; may be repeated")
    options = parser.parse_args()
    if not is_torchvision_available():
        print("torchvision is not installed; without it there is nothing to compare with", file=sys.stderr)
        return 2
    disable_progress_bar()
    set_verbosity_error()
    rows = []
    for family in options.family or SEEING:
        with tempfile.TemporaryDirectory() as folder:
            SPECIMENS[family].save(Path(folder))
            ours = Ours(Path(folder))
            seen = videos(ours, Path(folder)) if SPECIMENS[family].video else ("", "")
            rows.append((family, *images(ours, Path(folder)), *seen))
    header = ("family", "largest", "mean", "answers", "tokens", "video: largest", "mean")
    print(markdown_table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
