"""Mean pooling over cells of the grid: the control for methods that merge.

LLaMA-VID's content tokens (Li et al., ECCV 2024, arXiv:2311.17043) are such means; without that model's training this
is what remains of them.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import torch

from prismserve.compression.base import KeepConfig, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing


class MeanPooling(Reducing):
    """Cut the grid into exactly k cells as square as they come, and keep the mean of each.

    The rows are cut into bands of equal height (to one row), and each band into its share of the k cells, of equal
    width (to one column). A cell's mean stands at the position of its patch nearest to the cell's middle.
    """

    name: ClassVar[str] = "pool"
    section: ClassVar[str] = "control"
    source: ClassVar[str] = ""
    Config: ClassVar[type[KeepConfig]] = KeepConfig

    def plan(self, features: VisualFeatures, config: KeepConfig) -> VisualPlan:
        """``indices`` [k] and ``weights`` [k, N], each row the mean of its cell."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        # The frames of a video are one picture, each below the one before.
        rows, columns = features.frames * features.grid[0], features.grid[1]
        kept, device = self.kept_tokens(config, rows * columns), features.tokens.device
        anchors, owner = _cut(rows, columns, kept)
        members = (owner == torch.arange(kept)[:, None]).float()
        return VisualPlan(anchors.to(device), (members / members.sum(1, keepdim=True)).to(device))


@functools.lru_cache(maxsize=64)
def _cut(rows: int, columns: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[count] int64 anchors of the disjoint cells, ascending, and [rows x columns] int64, whose each patch is.

    Both on the CPU, not to be changed.
    """
    # The lower of two middles, so that a tie goes to the lower index.
    by_anchor = sorted(
        ((top + bottom - 1) // 2 * columns + (left + right - 1) // 2, (top, bottom, left, right))
        for top, bottom, left, right in cells(rows, columns, count)
    )
    owner = torch.empty(rows, columns, dtype=torch.int64)
    for cell, (_, (top, bottom, left, right)) in enumerate(by_anchor):
        owner[top:bottom, left:right] = cell
    return torch.tensor([anchor for anchor, _ in by_anchor]), owner.flatten()


def cells(rows: int, columns: int, count: int, *, overlapping: bool = False) -> list[tuple[int, int, int, int]]:
    """Exactly ``count`` cells (top, bottom, left, right) that cover the grid, ends left out.

    Disjoint ones, or, ``overlapping``, those of adaptive average pooling, which share a row or column with a neighbour
    where the side does not divide.
    """
    fewest, most = math.ceil(count / columns), min(rows, count)
    bands = max(fewest, min(most, round(math.sqrt(count * rows / columns))))
    spill = bands - 1 if overlapping else 0
    out = []
    for band in range(bands):
        top, bottom = band * rows // bands, ((band + 1) * rows + spill) // bands
        parts = (band + 1) * count // bands - band * count // bands
        beyond = parts - 1 if overlapping else 0
        out += [
            (top, bottom, part * columns // parts, ((part + 1) * columns + beyond) // parts) for part in range(parts)
        ]
    return out


METHOD = MeanPooling()
