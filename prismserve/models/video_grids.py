"""Videos of the Qwen-VL line: frames merged in pairs, patches merged 2 x 2, positions of time, row and column.

Sources: arXiv:2409.12191 (M-RoPE), arXiv:2502.13923 (time in proportion to seconds), arXiv:2511.21631 (time stamps as
text before every pair of frames).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import ImageLayout
from prismserve.models.frames import CLIP_MEAN, CLIP_STD, FramePixels, FrameRecipe
from prismserve.models.grids import grid_positions

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from prismserve.core.types import FrameTimes
    from prismserve.models.base import ImageTools

_HALF: Final = (0.5, 0.5, 0.5)
_PATCHES_MIN, _PATCHES_MAX = 128, 768
"""Least and most merged patches of a frame where the checkpoint says nothing, by transformers' defaults."""


class MergedFrames(FrameRecipe):
    """Frames keep their aspect ratio; consecutive ones become one grid; a last one without partner is repeated.

    See :class:`prismserve.models.base.VideoRecipe`.
    """

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __init__(self, config: Any, tools: ImageTools) -> None:
        """Merge as the vision configuration and the checkpoint's video processor say.

        Raises:
            ModelLoadError: the two differ, or the video processor leaves out a step.
        """
        super().__init__(config.video_token_id, tools)
        vision, settings = config.vision_config, tools.video_settings()
        self.patch: int = vision.patch_size
        self.merge: int = vision.spatial_merge_size
        self.pair: int = vision.temporal_patch_size
        for name, value in (
            ("patch_size", self.patch),
            ("merge_size", self.merge),
            ("temporal_patch_size", self.pair),
        ):
            if settings.get(name, value) != value:
                message = f"the video processor's {name} is {settings[name]}, the model's is {value}"
                raise ModelLoadError(message, field="model")
        self.unit = self.patch * self.merge
        self.pixels = FramePixels.read(settings, self.mean, self.std)
        self.pixels_min, self.pixels_max = self._limits(settings)
        self.capped = bool(settings.get("cap_pixels_per_frame"))
        self.video_tokens_max: int | None = settings.get("max_video_tokens")
        self.tokens_per_second: float | None = getattr(vision, "tokens_per_second", None)

    def _limits(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        size = settings.get("size") or {}
        low = settings.get("min_pixels") or size.get("shortest_edge") or _PATCHES_MIN * self.unit**2
        high = settings.get("max_pixels") or size.get("longest_edge") or _PATCHES_MAX * self.unit**2
        return int(low), int(high)

    def frame_size(self, frames: int, height_px: int, width_px: int) -> tuple[int, int]:
        """(height, width) frames are scaled to; ValueError for an aspect ratio the processor refuses."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        most = self.pixels_max
        if self.capped:
            shared = int((self.video_tokens_max or 128_000) * self.unit**2 * 0.9) * self.pair // frames
            most = max(min(most, shared), int(self.pixels_min * 1.05))
        height, width = smart_resize(height_px, width_px, self.unit, min_pixels=self.pixels_min, max_pixels=most)
        return int(height), int(width)

    def grid(self, frames: int, height_px: int, width_px: int) -> tuple[int, int, int]:
        """(pairs of frames, rows, columns) of merged patches."""
        height, width = self.frame_size(frames, height_px, width_px)
        return -(-frames // self.pair), height // self.unit, width // self.unit

    def layout(self, height_px: int, width_px: int, times: FrameTimes) -> ImageLayout:
        """One raster after another; their times lie one apart, or as far as the seconds between them say."""
        count, rows, columns = self.grid(times.frames, height_px, width_px)
        positions = grid_positions(rows, columns, frames=count, interval=self._interval(times))
        span = max(rows, columns)
        return ImageLayout(
            count * rows * columns,
            (rows, columns),
            positions=positions,
            position_span=span,
            position_reach=max(span, int(positions[0, -1]) + 1),
            frames=count,
        )

    def _interval(self, times: FrameTimes) -> torch.Tensor:
        if self.tokens_per_second is None:
            return torch.ones(())
        # In float32, as the published model: the product is cut to an integer, where a rounding error is a whole step.
        return self.tokens_per_second * torch.tensor(self.pair / times.rate, dtype=torch.float32)

    def tensors(self, frames: np.ndarray[Any, Any]) -> Mapping[str, torch.Tensor]:
        """``pixel_values_videos`` [patches, values] and ``video_grid_thw`` [1, 3]."""
        height, width = self.frame_size(len(frames), *frames.shape[1:3])
        pixels = self.pixels.tensor(frames, height, width)
        missing = -len(frames) % self.pair
        pixels = torch.cat((pixels, pixels[-1:].expand(missing, -1, -1, -1)))
        count, rows, columns = len(pixels) // self.pair, height // self.patch, width // self.patch
        shape = (
            *(count, self.pair, 3),
            *(rows // self.merge, self.merge, self.patch),
            *(columns // self.merge, self.merge, self.patch),
        )
        # Patches of one merged token follow one another; within a patch: channel, frame of the pair, row, column.
        patches = pixels.reshape(shape).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return {
            "pixel_values_videos": patches.reshape(count * rows * columns, -1),
            "video_grid_thw": torch.tensor([[count, rows, columns]]),
        }


class StampedFrames(MergedFrames):
    """Qwen3-VL: a time stamp in text before each pair of frames, which stands between its own vision tokens."""

    mean = _HALF
    std = _HALF

    def __init__(self, config: Any, tools: ImageTools) -> None:
        """Mark frames with the vision tokens of the configuration."""
        super().__init__(config, tools)
        self.marks = tuple(tools.token_text(i) for i in (config.vision_start_token_id, config.vision_end_token_id))

    def frame_size(self, frames: int, height_px: int, width_px: int) -> tuple[int, int]:
        """As for the older models, but the limits are those of all frames together."""
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        most = self.pixels_max
        if self.capped:
            per_frame = min((self.video_tokens_max or _PATCHES_MAX) * self.unit**2, most // frames)
            most = max(per_frame, int(self.pixels_min * 1.05)) * frames
        # The published arithmetic takes one pair at least, and what is repeated to make one counts as shown.
        height, width = smart_resize(
            num_frames=max(frames, self.pair),
            height=height_px,
            width=width_px,
            temporal_factor=self.pair,
            factor=self.unit,
            min_pixels=self.pixels_min,
            max_pixels=most,
        )
        return int(height), int(width)

    def stamps(self, times: FrameTimes) -> list[float]:
        """Seconds written before each pair: the middle between its first and last frame."""
        seconds = [*times.seconds, *[times.seconds[-1]] * (-times.frames % self.pair)]
        return [(seconds[at] + seconds[at + self.pair - 1]) / 2 for at in range(0, len(seconds), self.pair)]

    def layout(self, height_px: int, width_px: int, times: FrameTimes) -> ImageLayout:
        """Text and rasters in turn; each raster's time is that of the position it begins at."""
        count, rows, columns = self.grid(times.frames, height_px, width_px)
        start, end = self.marks
        raster = grid_positions(rows, columns)
        ids: list[int] = []
        positions: list[torch.Tensor] = []
        slots: list[torch.Tensor] = []
        at = 0

        def write(text: str) -> None:
            nonlocal at
            tokens = self.tools.token_ids(text)
            ids.extend(tokens)
            positions.append(torch.arange(at, at + len(tokens)).expand(3, -1))
            at += len(tokens)

        for index, second in enumerate(self.stamps(times)):
            write(f"{end if index else ''}<{second:.1f} seconds>{start}")
            slots.append(torch.arange(len(ids), len(ids) + rows * columns))
            ids.extend([self.placeholder_id] * (rows * columns))
            positions.append(raster + at)
            at += max(rows, columns)
        write(end)
        return ImageLayout(
            len(ids),
            (rows, columns),
            tuple(ids),
            torch.cat(positions, dim=1),
            position_span=at,
            frames=count,
            raster=torch.cat(slots),
        )
