"""Greedy choices among rows of features as native kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prismserve.kernels.native.library import call
from prismserve.kernels.subsets.reference import SPENT

if TYPE_CHECKING:
    from prismserve.kernels.subsets.reference import Fading


def _placed(rows: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """[N, C] with contiguous channels, and how a kernel finds it."""
    rows = rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
    return rows, (rows.data_ptr(), rows.stride(0), rows.shape[0], rows.shape[1])


@dataclass(frozen=True, slots=True)
class _Kernel:
    """Quality and fading as a kernel takes them; holds the tensors it points into."""

    quality: torch.Tensor | None
    places: torch.Tensor | None
    share: float
    falloff: float

    @classmethod
    def of(cls, quality: torch.Tensor | None, fading: Fading | None) -> _Kernel:
        own = None if quality is None else quality.float().contiguous()
        if fading is None:
            return cls(own, None, 0.0, 0.0)
        return cls(own, fading.places.contiguous(), fading.share, fading.falloff)

    @property
    def arguments(self) -> tuple[int | None, int | None, float, float]:
        return _pointer(self.quality), _pointer(self.places), self.share, self.falloff


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def largest_determinant(
    rows: torch.Tensor, picks: int, quality: torch.Tensor | None, fading: Fading | None
) -> torch.Tensor:
    """As the reference."""
    rows, where = _placed(rows)
    chosen = torch.empty(picks, dtype=torch.int64)
    kernel = _Kernel.of(quality, fading)
    call("largest_determinant", *where, *kernel.arguments, picks, SPENT, chosen.data_ptr())
    return chosen


def determinant_folded(
    rows: torch.Tensor, picks: int, quality: torch.Tensor | None, fading: Fading | None, own: float, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference; cosines are computed once for choosing and folding."""
    rows, where = _placed(rows)
    chosen = torch.empty(picks, dtype=torch.int64)
    weights = torch.empty((picks, rows.shape[0]), dtype=torch.float32)
    kernel = _Kernel.of(quality, fading)
    call(
        "determinant_folded", *where, *kernel.arguments, picks, SPENT, own, share, chosen.data_ptr(), weights.data_ptr()
    )
    return chosen, weights


def farthest_first(rows: torch.Tensor, picks: int) -> torch.Tensor:
    """As the reference."""
    rows, where = _placed(rows)
    chosen = torch.empty(picks, dtype=torch.int64)
    call("farthest_first", *where, picks, chosen.data_ptr())
    return chosen


def merge_alike(rows: torch.Tensor, groups: int, per_round: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference."""
    rows, where = _placed(rows)
    places, owner = torch.empty(groups, dtype=torch.int64), torch.empty(rows.shape[0], dtype=torch.int64)
    call("merge_alike", *where, groups, per_round, places.data_ptr(), owner.data_ptr())
    return places, owner


def drop_alike(rows: torch.Tensor, among: torch.Tensor, kept: int, per_round: int) -> torch.Tensor:
    """As the reference."""
    rows, where = _placed(rows)
    left = among.clone()
    call("drop_alike", *where, left.data_ptr(), left.shape[0], kept, per_round)
    return left[:kept]


def closest(rows: torch.Tensor, among: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
    """As the reference."""
    rows, where = _placed(rows)
    among, partners = among.contiguous(), partners.contiguous()
    owner = torch.empty(among.shape[0], dtype=torch.int64)
    sizes = (among.data_ptr(), among.shape[0], partners.data_ptr(), partners.shape[0])
    call("closest", *where, *sizes, owner.data_ptr())
    return owner


def fold_alike(rows: torch.Tensor, kept: torch.Tensor, centres: torch.Tensor, own: float, share: float) -> torch.Tensor:
    """As the reference."""
    rows, where = _placed(rows)
    kept, centres = kept.contiguous(), centres.contiguous()
    weights = torch.empty((kept.shape[0], rows.shape[0]), dtype=torch.float32)
    sizes = (kept.data_ptr(), kept.shape[0], centres.data_ptr(), centres.shape[0])
    call("fold_alike", *where, *sizes, own, share, weights.data_ptr())
    return weights


def fold_nearest(
    rows: torch.Tensor, kept: torch.Tensor, scores: torch.Tensor, nearest: int, *, mean: bool
) -> torch.Tensor:
    """As the reference."""
    rows, where = _placed(rows)
    kept, scores = kept.contiguous(), scores.float().contiguous()
    weights = torch.empty((kept.shape[0], rows.shape[0]), dtype=torch.float32)
    sizes = (kept.data_ptr(), kept.shape[0], scores.data_ptr(), nearest)
    call("fold_nearest", *where, *sizes, mean, weights.data_ptr())
    return weights


def merge_rows(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As the reference, without a pass over what counts nothing."""
    rows, where = _placed(rows)
    weights = weights if weights.stride(1) == 1 else weights.contiguous()
    out = torch.empty((weights.shape[0], rows.shape[1]), dtype=torch.float32)
    call("merge_rows", *where, weights.data_ptr(), weights.stride(0), weights.shape[0], out.data_ptr())
    return out
