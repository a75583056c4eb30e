"""Images of the Qwen-VL line: any size, patches merged 2 x 2, positions of time, row and column (arXiv:2409.12191)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from prismserve.models.base import ImageLayout
from prismserve.models.images import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image

    from prismserve.models.base import ImageShape, ImageTools


def grid_positions(rows: int, columns: int, *, frames: int = 1, interval: torch.Tensor | float = 1.0) -> torch.Tensor:
    """[3, frames * rows * columns] int64 time, row and column of tokens in raster order, frame after frame.

    The times of frames lie ``interval`` apart and are cut to integers; that of a picture is 0.
    """
    seconds = (torch.arange(frames) * interval).long()
    grid = torch.meshgrid(seconds, torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack(grid).reshape(3, -1)


class MergedGrid(Recipe):
    """An image keeps its aspect ratio; its size is rounded to whole merged patches within the processor's limits."""

    def __init__(self, config: Any, shape: ImageShape, tools: ImageTools) -> None:
        """Merge as ``spatial_merge_size`` of the vision configuration says."""
        super().__init__(shape, tools)
        self.merge: int = config.vision_config.spatial_merge_size

    def layout(self, height_px: int, width_px: int, *, alone: bool) -> ImageLayout:  # noqa: ARG002 - the same either way
        """One raster grid; ValueError for an aspect ratio the processor refuses."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        processor = self.tools.image_processor
        unit = processor.patch_size * self.merge
        limits = {"min_pixels": processor.size["shortest_edge"], "max_pixels": processor.size["longest_edge"]}
        height, width = smart_resize(height_px, width_px, unit, **limits)
        rows, columns = height // unit, width // unit
        return ImageLayout(
            rows * columns, (rows, columns), positions=grid_positions(rows, columns), position_span=max(rows, columns)
        )

    def tensors(self, image: Image.Image, *, alone: bool) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """``pixel_values`` [patches, values] and ``image_grid_thw`` [1, 3]."""
        return self.processed([image], "pixel_values", "image_grid_thw")
