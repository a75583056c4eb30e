"""Greedy choices among rows of features as native kernels."""

from __future__ import annotations

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


def largest_determinant(
    rows: torch.Tensor, picks: int, quality: torch.Tensor | None, fading: Fading | None
) -> torch.Tensor:
    """As the reference."""
    rows, where = _placed(rows)
    quality = None if quality is None else quality.float().contiguous()
    places = None if fading is None else fading.places.contiguous()
    chosen = torch.empty(picks, dtype=torch.int64)
    call(
        "largest_determinant",
        *where,
        None if quality is None else quality.data_ptr(),
        None if places is None else places.data_ptr(),
        0.0 if fading is None else fading.share,
        0.0 if fading is None else fading.falloff,
        picks,
        SPENT,
        chosen.data_ptr(),
    )
    return chosen


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


def most_alike(rows: torch.Tensor, among: torch.Tensor, keep: int) -> torch.Tensor:
    """As the reference."""
    rows, where = _placed(rows)
    among = among.contiguous()
    found = torch.empty((among.shape[0], keep), dtype=torch.int64)
    call("most_alike", *where, among.data_ptr(), among.shape[0], keep, found.data_ptr())
    return found


def fold_alike(rows: torch.Tensor, kept: torch.Tensor, share: float) -> torch.Tensor:
    """As the reference."""
    rows, where = _placed(rows)
    kept = kept.contiguous()
    weights = torch.empty((kept.shape[0], rows.shape[0]), dtype=torch.float32)
    call("fold_alike", *where, kept.data_ptr(), kept.shape[0], share, weights.data_ptr())
    return weights


def merge_rows(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As the reference, without a pass over what counts nothing."""
    rows, where = _placed(rows)
    weights = weights if weights.stride(1) == 1 else weights.contiguous()
    out = torch.empty((weights.shape[0], rows.shape[1]), dtype=torch.float32)
    call("merge_rows", *where, weights.data_ptr(), weights.stride(0), weights.shape[0], out.data_ptr())
    return out
