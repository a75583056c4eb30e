"""Frames of a video to the pixels an encoder takes, by the checkpoint's own settings.

transformers' video processors need torchvision and give other pixels with other builds of it; frames are scaled here by
Pillow, as the checkpoint's images are, so that they are the same on every worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from PIL import Image

from prismserve.core.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prismserve.core.types import FrameTimes
    from prismserve.models.base import ImageTools

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
_STEPS: Final = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True, slots=True)
class FramePixels:
    """How frames are scaled and normalised.

    Attributes:
        mean: per channel, of samples between 0 and 1.
        std: as ``mean``.
        resample: Pillow's filter.
        factor: what an 8-bit sample is multiplied by.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling
    factor: float

    @classmethod
    def read(
        cls,
        settings: Mapping[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> FramePixels:
        """What a video processor's settings say, with the defaults of its class.

        Raises:
            ModelLoadError: the settings ask for a step to be left out, or for crops.
        """
        unsaid = [step for step in _STEPS if settings.get(step) is False]
        if unsaid or settings.get("do_center_crop"):
            message = (
                f"the video processor's {unsaid[0] if unsaid else 'do_center_crop'} is not as the model expects it"
            )
            raise ModelLoadError(message, field="model")
        return cls(
            tuple(settings.get("image_mean") or mean),
            tuple(settings.get("image_std") or std),
            Image.Resampling(settings.get("resample") or resample),
            settings.get("rescale_factor") or 1 / 255,
        )

    def tensor(self, frames: np.ndarray[Any, Any], height_px: int, width_px: int) -> torch.Tensor:
        """Scale and normalise.

        Args:
            frames: uint8 [F, height, width, 3], RGB.
            height_px: of the result.
            width_px: of the result.

        Returns:
            [F, 3, height_px, width_px] float32.
        """
        scaled = torch.from_numpy(self.scaled(frames, height_px, width_px))
        pixels = scaled.permute(0, 3, 1, 2).to(torch.float32) * self.factor
        mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def scaled(self, frames: np.ndarray[Any, Any], height_px: int, width_px: int) -> np.ndarray[Any, Any]:
        """Scale and nothing else: uint8 [F, height, width, 3] to [F, height_px, width_px, 3]."""
        return np.stack([self._resized(frame, height_px, width_px) for frame in frames])

    def check_size(self, settings: Mapping[str, Any], height_px: int, width_px: int) -> None:
        """ModelLoadError if the video processor scales frames to another size than the vision tower takes."""
        size = settings.get("size") or {}
        given = [size.get("height", height_px), size.get("width", width_px)]
        if given != [height_px, width_px]:
            message = f"the video processor gives {given} pixels, the vision tower takes {[height_px, width_px]}"
            raise ModelLoadError(message, field="model")

    def _resized(self, frame: np.ndarray[Any, Any], height_px: int, width_px: int) -> np.ndarray[Any, Any]:
        if frame.shape[:2] == (height_px, width_px):
            return frame
        return np.asarray(Image.fromarray(frame).resize((width_px, height_px), self.resample))


class FrameRecipe:
    """The parts most video recipes share; see :class:`prismserve.models.base.VideoRecipe`."""

    before = ""
    after = ""
    chat_template: str | None = None

    def __init__(self, placeholder_id: int, tools: ImageTools) -> None:
        """A template writes the token ``placeholder_id`` where a video stands."""
        self.tools = tools
        self.placeholder_id = placeholder_id
        self.placeholder = tools.token_text(placeholder_id)

    def around(self, times: FrameTimes) -> tuple[str, str]:  # noqa: ARG002 - the same for any video
        """Text that stands before and after any video."""
        return self.before, self.after
