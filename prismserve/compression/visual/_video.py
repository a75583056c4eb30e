"""What several methods for video are made of: frames as an axis, budgets shared out, members folded into centres."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from prismserve.compression.base import VisualPlan
from prismserve.compression.visual.pool import cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.compression.base import VisualFeatures


def framed(rows: torch.Tensor, features: VisualFeatures) -> torch.Tensor:
    """[T, n, C] float32 of [N, C]: the n tokens of each of T frames."""
    return rows.float().view(features.frames, -1, rows.shape[-1])


def cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[...] float32, cosine along the last axis; 0 where a row has no direction."""
    return (functional.normalize(one, dim=-1) * functional.normalize(other, dim=-1)).sum(-1)


def even_shares(total: int, capacities: Sequence[int]) -> list[int]:
    """Parts that sum to ``total``, as equal as their capacities allow; what does not divide is spread evenly.

    Args:
        total: at most the sum of ``capacities``.
        capacities: most that each part may be.
    """
    shares, left = [0] * len(capacities), total
    while left:
        room = [part for part, most in enumerate(capacities) if shares[part] < most]
        each = left // len(room)
        for place, part in enumerate(room):
            wanted = each or (place + 1) * left // len(room) - place * left // len(room)
            shares[part] += min(wanted, capacities[part] - shares[part])
        left = total - sum(shares)
    return shares


def proportional_shares(total: int, sizes: Sequence[int]) -> list[int]:
    """Parts that sum to ``total``, in proportion to ``sizes`` (of sum ``total`` or more), none above its size."""
    whole, seen, shares = max(1, sum(sizes)), 0, []
    for size in sizes:
        shares.append((seen + size) * total // whole - seen * total // whole)
        seen += size
    return shares


def middles(count: int, picks: int, device: torch.device) -> torch.Tensor:
    """[picks] int64, the middles of ``picks`` equal parts of ``count`` places."""
    return (2 * torch.arange(picks, device=device) + 1) * count // (2 * picks)


def centre_weights(owner: torch.Tensor, centres: torch.Tensor, own: float, *, fair: bool = False) -> torch.Tensor:
    """What each of m tokens counts in the token it is folded into.

    Args:
        owner: [m] int64, number of the centre a token belongs to; a centre belongs to itself.
        centres: [c] int64, which of the m tokens are centres.
        own: weight of a centre beside the mean of the others; a centre without others counts 1.
        fair: whether a centre counts no less than any of the others; with ``own`` 0 all count the same.

    Returns:
        [m] float32, of sum 1 over the tokens of each centre.
    """
    others = (torch.bincount(owner, minlength=centres.shape[0]) - 1).float()
    itself = torch.full_like(others, own)
    if fair:
        itself = itself.maximum(1.0 / (others + 1.0))
    itself = torch.where(others > 0, itself, 1.0)
    weights = ((1.0 - itself) / others.clamp(min=1.0))[owner]
    weights[centres] = itself
    return weights


class Merging:
    """A plan in the making: tokens that are kept as they are, and centres with what is folded into them."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        """Nothing is kept yet of ``tokens``."""
        self._tokens = tokens
        self._device = device
        self._kept: list[torch.Tensor] = []
        self._into: list[torch.Tensor] = []
        self._members: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def keep(self, places: torch.Tensor) -> None:
        """Keep tokens as they are."""
        self.fold(places, places, places, torch.ones(places.shape[0], device=self._device))

    def fold(self, kept: torch.Tensor, into: torch.Tensor, members: torch.Tensor, weights: torch.Tensor) -> None:
        """Keep the places ``kept`` [c]; ``members`` [m] count ``weights`` [m] in the places ``into`` [m], each kept."""
        self._kept.append(kept)
        self._into.append(into)
        self._members.append(members)
        self._weights.append(weights)

    def plan(self) -> VisualPlan:
        """All that was kept, in order of place, with weights [k, N]."""
        indices = torch.cat(self._kept).sort().values
        rows = torch.searchsorted(indices, torch.cat(self._into))
        weights = torch.zeros(indices.shape[0], self._tokens, device=self._device)
        weights[rows, torch.cat(self._members)] = torch.cat(self._weights)
        return VisualPlan(indices, weights)


def pooled_frames(features: VisualFeatures, shares: Sequence[int]) -> VisualPlan:
    """Every frame as the means of its share of cells, as square as they come; each at the patch nearest its middle.

    Cells are those of adaptive average pooling: where a side does not divide, neighbours have a row or column in common.

    Args:
        features: of which the grid and the number of frames matter.
        shares: cells of each frame, 0 to all its tokens.

    Returns:
        ``indices`` [k] and ``weights`` [k, N].
    """
    rows, columns = features.grid
    device = features.tokens.device
    merging = Merging(features.tokens.shape[0], device)
    for frame, share in enumerate(shares):
        places, members, into, weights = [], [], [], []
        for top, bottom, left, right in cells(rows, columns, share, overlapping=True) if share else ():
            # The lower of two middles, so that a tie goes to the lower index.
            place = (top + bottom - 1) // 2 * columns + (left + right - 1) // 2
            inside = [row * columns + column for row in range(top, bottom) for column in range(left, right)]
            places.append(place)
            members += inside
            into += [place] * len(inside)
            weights += [1.0 / len(inside)] * len(inside)
        offset = frame * rows * columns
        merging.fold(
            torch.tensor(places, dtype=torch.int64, device=device) + offset,
            torch.tensor(into, dtype=torch.int64, device=device) + offset,
            torch.tensor(members, dtype=torch.int64, device=device) + offset,
            torch.tensor(weights, dtype=torch.float32, device=device),
        )
    return merging.plan()


def evenly_pooled(features: VisualFeatures, kept: int) -> VisualPlan:
    """:func:`pooled_frames` with an equal share of ``kept`` tokens for every frame."""
    rows, columns = features.grid
    return pooled_frames(features, even_shares(kept, [rows * columns] * features.frames))
