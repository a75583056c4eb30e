"""Choices among rows of features (the largest determinant, the farthest point, what is most alike), and merging them."""

from __future__ import annotations

import torch

from prismserve.kernels.dispatch import use_native
from prismserve.kernels.subsets import native, reference
from prismserve.kernels.subsets.reference import Fading


def largest_determinant(
    rows: torch.Tensor, picks: int, quality: torch.Tensor | None = None, fading: Fading | None = None
) -> torch.Tensor:
    """[picks] int64 rows of [N, C], in the order they were chosen; see :func:`reference.largest_determinant`."""
    if use_native(rows):
        return native.largest_determinant(rows, picks, quality, fading)
    return reference.largest_determinant(rows, picks, quality, fading)


def determinant_folded(
    rows: torch.Tensor, picks: int, quality: torch.Tensor | None, fading: Fading | None, own: float, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[picks] int64 rows, ascending, and their [picks, N] weights; see :func:`reference.determinant_folded`."""
    if use_native(rows):
        return native.determinant_folded(rows, picks, quality, fading, own, share)
    return reference.determinant_folded(rows, picks, quality, fading, own, share)


def farthest_first(rows: torch.Tensor, picks: int) -> torch.Tensor:
    """[picks] int64 rows of [N, C], in the order they were chosen; see :func:`reference.farthest_first`."""
    if use_native(rows):
        return native.farthest_first(rows, picks)
    return reference.farthest_first(rows, picks)


def merge_alike(rows: torch.Tensor, groups: int, per_round: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[groups] int64 places and [N] int64 groups of rows; see :func:`reference.merge_alike`."""
    if use_native(rows):
        return native.merge_alike(rows, groups, per_round)
    return reference.merge_alike(rows, groups, per_round)


def drop_alike(rows: torch.Tensor, among: torch.Tensor, kept: int, per_round: int) -> torch.Tensor:
    """[kept] int64 of the rows ``among``, ascending; see :func:`reference.drop_alike`."""
    if use_native(rows):
        return native.drop_alike(rows, among, kept, per_round)
    return reference.drop_alike(rows, among, kept, per_round)


def closest(rows: torch.Tensor, among: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
    """[A] int64, which of ``partners`` each of the rows ``among`` is most like; see :func:`reference.closest`."""
    if use_native(rows):
        return native.closest(rows, among, partners)
    return reference.closest(rows, among, partners)


def fold_alike(rows: torch.Tensor, kept: torch.Tensor, centres: torch.Tensor, own: float, share: float) -> torch.Tensor:
    """[k, N] float32 weights of the rows ``kept`` when others are folded in; see :func:`reference.fold_alike`."""
    if use_native(rows):
        return native.fold_alike(rows, kept, centres, own, share)
    return reference.fold_alike(rows, kept, centres, own, share)


def fold_nearest(
    rows: torch.Tensor, kept: torch.Tensor, scores: torch.Tensor, nearest: int, *, mean: bool
) -> torch.Tensor:
    """[k, N] float32 weights of the rows ``kept`` that take in those like them; see :func:`reference.fold_nearest`."""
    if use_native(rows):
        return native.fold_nearest(rows, kept, scores, nearest, mean=mean)
    return reference.fold_nearest(rows, kept, scores, nearest, mean=mean)


def merge_rows(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[k, C] float32 of weights [k, N] and rows [N, C]; see :func:`reference.merge_rows`."""
    if use_native(rows) and use_native(weights):
        return native.merge_rows(weights, rows)
    return reference.merge_rows(weights, rows)


__all__ = [
    "Fading",
    "closest",
    "determinant_folded",
    "drop_alike",
    "farthest_first",
    "fold_alike",
    "fold_nearest",
    "largest_determinant",
    "merge_alike",
    "merge_rows",
]
