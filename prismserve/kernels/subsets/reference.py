"""Greedy choices among rows of features in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

SPENT: Final = 1e-6
"""Share of a row's own square below which what is left of it counts as nothing: rounding of float32, not volume."""


@dataclass(frozen=True, slots=True)
class Fading:
    """Similarity that fades with distance: it is scaled by ``1 - share + share exp(-distance^2 / (2 radius^2))``.

    Attributes:
        places: [N, 3] float32 coordinates of the rows.
        share: of the similarity that fades, 0 to 1.
        radius: standard deviation of the fading, in units of the coordinates.
    """

    places: torch.Tensor
    share: float
    radius: float

    @property
    def falloff(self) -> float:
        """What a squared distance is multiplied with in the exponent."""
        return -0.5 / self.radius**2


def largest_determinant(
    rows: torch.Tensor, picks: int, quality: torch.Tensor | None = None, fading: Fading | None = None
) -> torch.Tensor:
    """Choose rows one after another, each to enlarge the determinant of the chosen rows' kernel most.

    The kernel of rows i and j is ``quality_i quality_j cosine_ij``, faded with their distance. Greedy MAP of a
    determinantal point process by incremental Cholesky factors (Chen et al., "Fast Greedy MAP Inference for
    Determinantal Point Process to Improve Recommendation Diversity", NeurIPS 2018, algorithm 1), with a row of the
    kernel computed when its token is chosen: O(N picks (C + picks)), and no [N, N] matrix. Once what is left lies in
    the span of what was chosen, the rest is taken in order of index.

    Args:
        rows: [N, C] float32; a row of zeros is similar to none and chosen last.
        picks: how many, at most N.
        quality: [N] float32, at least 0; None for 1 everywhere.
        fading: None where distance does not count.

    Returns:
        [picks] int64 in the order they were chosen; ties go to the lower index.
    """
    count = rows.shape[0]
    unit = functional.normalize(rows, dim=-1)
    weight = rows.new_ones(count) if quality is None else quality
    gain = weight.square() * (rows != 0).any(dim=1)
    floor = SPENT * gain
    factors = rows.new_zeros((picks, count))
    chosen = torch.empty(picks, dtype=torch.int64, device=rows.device)
    for i in range(picks):
        pick = gain.argmax()
        chosen[i] = pick
        row = (unit @ unit[pick]) * weight * weight[pick]
        if fading is not None:
            squared = (fading.places - fading.places[pick]).square().sum(1)
            row = row * (1.0 - fading.share + fading.share * (fading.falloff * squared).exp())
        left = gain[pick]
        scale = torch.where(left > 0.0, left.clamp(min=1e-30).rsqrt(), 0.0)
        row = (row - factors[:i, pick] @ factors[:i]) * scale
        factors[i] = row
        gain = gain - row.square()
        # What is left is at least zero in exact arithmetic; what was chosen must stay below it.
        gain = torch.where(gain <= floor, 0.0, gain)
        gain[chosen[: i + 1]] = -1.0
    return chosen


def determinant_folded(
    rows: torch.Tensor, picks: int, quality: torch.Tensor | None, fading: Fading | None, own: float, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose as :func:`largest_determinant`, then fold every other row into the chosen one it is most like.

    Args:
        rows: [N, C] float32.
        picks: how many, 1 to N.
        quality: as there.
        fading: as there; it plays no part in what is folded where.
        own: see :func:`fold_alike`, where all that was chosen are centres.
        share: see there.

    Returns:
        [picks] int64, ascending, and [picks, N] float32 weights.
    """
    kept = largest_determinant(rows, picks, quality, fading).sort().values
    return kept, fold_alike(rows, kept, kept, own, share)


def farthest_first(rows: torch.Tensor, picks: int) -> torch.Tensor:
    """Greedy max-min selection by cosine distance.

    The first pick is the row whose nearest neighbour is farthest; each next one is the row farthest from its nearest
    among those chosen (Alvar et al., DivPrune, arXiv:2503.02175, algorithm 1). A row of zeros is at distance 1 from all.

    Args:
        rows: [N, C] float32.
        picks: how many, at least 1, at most N.

    Returns:
        [picks] int64 in the order they were chosen; ties go to the lower index.
    """
    unit = functional.normalize(rows, dim=-1)
    apart = 1.0 - unit @ unit.T
    chosen = torch.empty(picks, dtype=torch.int64, device=rows.device)
    chosen[0] = apart.fill_diagonal_(torch.inf).amin(1).argmax()
    nearest = apart[chosen[0]].clone()
    for i in range(1, picks):
        nearest[chosen[:i]] = -torch.inf
        chosen[i] = nearest.argmax()
        nearest = torch.minimum(nearest, apart[chosen[i]])
    return chosen


def merge_alike(rows: torch.Tensor, groups: int, per_round: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge rows pairwise until few groups are left: rounds of bipartite soft matching.

    In a round the groups, in order, are split alternately into A and B. Every group of A proposes to the most similar
    one of B (cosine of mean rows), and the best proposals are carried out; the group of B keeps its place (Bolya et
    al., ToMe, arXiv:2210.09461, section 3).

    Args:
        rows: [N, d] float32.
        groups: how many are left, 1 to N.
        per_round: proposals carried out in a round, at most half of the groups.

    Returns:
        [groups] int64, the place each group stands at, ascending; [N] int64, the group each row belongs to.
    """
    count = rows.shape[0]
    places = torch.arange(count, device=rows.device)
    owner, sums = places.clone(), rows.clone()
    while places.shape[0] > groups:
        pairs = min(per_round, places.shape[0] - groups, places.shape[0] // 2)
        best, partner = _closest(sums[::2], sums[1::2])
        proposing = _ranked(best)[:pairs]
        source, target = 2 * proposing, 2 * partner[proposing] + 1
        sums.index_add_(0, target, sums[source])
        staying = torch.ones(places.shape[0], dtype=torch.bool, device=rows.device)
        staying[source] = False
        number = staying.cumsum(0) - 1
        number[source] = number[target]
        owner = number[owner]
        places, sums = places[staying], sums[staying]
    return places, owner


def drop_alike(rows: torch.Tensor, among: torch.Tensor, kept: int, per_round: int) -> torch.Tensor:
    """Drop rows that are most like others until few are left.

    In a round the rows that are left, in order, are split alternately into A and B; those of A most similar (cosine) to
    any of B leave (Zhang et al., VisPruner, arXiv:2412.01818, section 3.3, as its published code does).

    Args:
        rows: [N, C] float32.
        among: [R] int64 rows to choose from, ascending.
        kept: how many are left, at most R.
        per_round: how many leave in a round.

    Returns:
        [kept] int64 ascending.
    """
    while among.shape[0] > kept:
        first, second = among[::2], among[1::2]
        leaving = min(per_round, among.shape[0] - kept)
        if second.shape[0] == 0:
            return among[:0]
        best, _ = _closest(rows[first], rows[second])
        among = torch.cat((first[_ranked(best)[leaving:]], second)).sort().values
    return among


def closest(rows: torch.Tensor, among: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
    """Which of some rows each of others is most like (cosine).

    Args:
        rows: [N, C] float32.
        among: [A] int64 rows that choose.
        partners: [P] int64 rows to choose from, at least 1.

    Returns:
        [A] int64 numbers within ``partners``; of equals the earlier.
    """
    return _closest(rows[among], rows[partners])[1]


def fold_alike(rows: torch.Tensor, kept: torch.Tensor, centres: torch.Tensor, own: float, share: float) -> torch.Tensor:
    """What rows that are kept are made of if every other is folded into the centre it is most like (cosine).

    Args:
        rows: [N, C] float32.
        kept: [k] int64, ascending, 1 to N.
        centres: [c] int64, ascending, at least 1, all of them kept.
        own: weight of a centre into which something is folded; every other kept row has 1.
        share: above 0, weight of the mean of what is folded into a centre.

    Returns:
        [k, N] float32 weights; of equally similar centres the first takes.
    """
    left = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    left[kept] = False
    others = left.nonzero()[:, 0]
    owner = closest(rows, others, centres)
    members = torch.bincount(owner, minlength=centres.shape[0]).float()
    places = torch.searchsorted(kept.contiguous(), centres.contiguous())
    weights = torch.zeros(kept.shape[0], rows.shape[0], device=rows.device)
    weights.scatter_(1, kept[:, None], 1.0)
    weights[places, centres] = torch.where(members > 0, own, 1.0)
    weights[places[owner], others] = (share / members.clamp(min=1.0))[owner]
    return weights


def fold_nearest(
    rows: torch.Tensor, kept: torch.Tensor, scores: torch.Tensor, nearest: int, *, mean: bool
) -> torch.Tensor:
    """What rows that are kept are made of if each takes in the rows most like it (cosine), times their scores.

    Args:
        rows: [N, C] float32.
        kept: [k] int64.
        scores: [N] float32 weights of what is taken in; a kept row weighs 1 in itself.
        nearest: how many it takes in, 0 to N - 1, never itself; of equally similar ones the lower.
        mean: whether each row of weights is divided by its sum.

    Returns:
        [k, N] float32.
    """
    unit = functional.normalize(rows, dim=-1)
    similar = (unit[kept] @ unit.T).scatter_(1, kept[:, None], -torch.inf)
    found = torch.sort(similar, dim=1, descending=True, stable=True).indices[:, :nearest]
    weights = torch.zeros_like(similar).scatter_(1, found, scores[found]).scatter_(1, kept[:, None], 1.0)
    return weights / weights.sum(1, keepdim=True) if mean else weights


def merge_rows(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows, where most weights are 0.

    Args:
        weights: [k, N] float32.
        rows: [N, C] float32.

    Returns:
        [k, C] float32; what is made of one row with weight 1 is that row, bit for bit.
    """
    merged = weights @ rows
    # Gathered rather than multiplied, so that reduced matmul precision cannot change a row nothing was merged into.
    largest, place = weights.max(1)
    alone = (largest == 1) & ((weights != 0).sum(1) == 1)
    return torch.where(alone[:, None], rows[place], merged)


def _closest(proposers: torch.Tensor, partners: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest cosine of each of [a, C] with any of [b, C], and which."""
    similar = functional.normalize(proposers, dim=-1) @ functional.normalize(partners, dim=-1).T
    best: torch.Tensor = similar.amax(1)
    return best, similar.argmax(1)


def _ranked(values: torch.Tensor) -> torch.Tensor:
    return torch.sort(values, descending=True, stable=True).indices
