"""HoliTom's outer stage: the best division of a video into stretches, static patches merged over time, then in space.

Source: Shao et al., "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025
(arXiv:2505.21334), sections 3.1 and 3.2, and its published code. The inner stage is the prefill method
``holitom_inner``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan
from prismserve.compression.density import density_centres
from prismserve.compression.visual._shared import Reducing, projected
from prismserve.compression.visual._video import Merging, centre_weights, cosine, framed, proportional_shares


class HolitomConfig(KeepConfig):
    """Parameters of HoliTom's outer stage.

    Attributes:
        similarity: cosine above which a patch does not change from one frame to the next (tau); the paper takes 0.65
            where it keeps 10 %.
        own: weight of a cluster's centre beside the mean of its other members (beta).
        neighbours: of a token's density (K).
        window: most frames of one stretch.
    """

    similarity: float = Field(default=0.8, ge=-1.0, le=1.0, strict=True, allow_inf_nan=False)
    own: float = Field(default=0.6, ge=0.0, le=1.0, strict=True, allow_inf_nan=False)
    neighbours: int = Field(default=7, ge=1, le=1024, strict=True)
    window: int = Field(default=1024, ge=1, le=65536, strict=True)


class Holitom(Reducing):
    """Merge what stands still over the frames of a stretch, then cluster what is left of each stretch and frame.

    A patch is static in a stretch of frames if its cosine with the next frame is above ``similarity`` throughout; the
    stretches are those that save most tokens, found by dynamic programming over all divisions. A stretch's static
    patches become their mean over its frames, in the place they have in its first one. Of the M tokens then left, each
    group (the static patches of a stretch, the others of each frame) keeps its share of the budget as DPC-KNN centres
    on decoder inputs; a centre becomes ``own`` of itself and the rest of the mean of its other members.

    Differences from the published code. It keeps part of a frame's changing patches by the encoder's attention (1 - D
    of them, all by default); the video encoders served here give none, so D is 1. Its counts per group are rounded, so
    that their sum varies; here they sum to the budget. Where merging over time would leave fewer tokens than the budget,
    the static patches that change most are left apart. It takes at most as many neighbours as there are centres, with
    one centre only the token itself. Ties are broken by index, not by noise. Survivors keep their positions.

    An image is one frame: nothing is static, and what remains is the clustering.
    """

    name: ClassVar[str] = "holitom"
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Shao et al., HoliTom, NeurIPS 2025, arXiv:2505.21334 (outer stage)"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROJECTED})
    Config: ClassVar[type[HolitomConfig]] = HolitomConfig

    def plan(self, features: VisualFeatures, config: HolitomConfig) -> VisualPlan:
        """``indices`` [k] and ``weights`` [k, N], each row of sum 1."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        frames = framed(projected(features), features)
        count, patches = features.tokens.shape[0], frames.shape[1]
        kept = self.kept_tokens(config, count)
        alike = cosine(frames[1:], frames[:-1])
        stretches = divide(alike > config.similarity, config.window)
        groups = _groups(stretches, static_patches(alike, stretches, config.similarity, kept))
        merging = Merging(count, frames.device)
        shares = proportional_shares(kept, [places.shape[0] for places, _ in groups])
        for (places, span), share in zip(groups, shares, strict=True):
            if share == 0:
                continue
            over_time = places + patches * torch.arange(span, device=places.device)[:, None]
            merged = frames.flatten(0, 1)[over_time].mean(0)
            centres, owner = density_centres(merged, share, config.neighbours)
            weights = centre_weights(owner, centres, config.own) / span
            into = places[centres]
            merging.fold(into, into[owner].repeat(span), over_time.flatten(), weights.repeat(span))
        return merging.plan()


def divide(still: torch.Tensor, window: int) -> list[tuple[int, int]]:
    """Stretches (first frame, last frame) that together save most tokens.

    Args:
        still: [T - 1, n] bool, whether a patch is as it was from frame t to t + 1.
        window: most frames of a stretch.

    Returns:
        All T frames in order. A stretch from s to e saves (e - s) tokens for every patch that is still throughout; of
        equal savings the later, shorter stretch is taken.
    """
    still = still.cpu()
    count = still.shape[0] + 1
    saved = torch.zeros(count, count, dtype=torch.int64)
    for first in range(count - 1):
        throughout = still[first : first + window - 1].cumprod(0).sum(1)
        reach = throughout.shape[0]
        saved[first, first + 1 : first + 1 + reach] = throughout * torch.arange(1, reach + 1)
    best, begins = torch.zeros(count + 1, dtype=torch.int64), [0] * count
    for last in range(count):
        # From the nearest first frame backwards, so that the first of equals is the shortest.
        lowest = max(0, last - window + 1)
        values = (best[lowest : last + 1] + saved[lowest : last + 1, last]).flip(0)
        choice = int(values.argmax())
        best[last + 1], begins[last] = values[choice], last - choice
    stretches, last = [], count - 1
    while last >= 0:
        stretches.append((begins[last], last))
        last = begins[last] - 1
    return stretches[::-1]


def static_patches(alike: torch.Tensor, stretches: list[tuple[int, int]], similarity: float, kept: int) -> torch.Tensor:
    """[stretches, n] bool: which patches are merged over the frames of a stretch.

    Args:
        alike: [T - 1, n] cosine of a patch with that of the next frame.
        stretches: from :func:`divide`.
        similarity: above which it is static.
        kept: tokens that must be left at least, at most all; patches that change most are not merged where it takes that.
    """
    patches = alike.shape[1]
    never = alike.new_full((patches,), -torch.inf)
    least = torch.stack([alike[first:last].amin(0) if last > first else never for first, last in stretches])
    static = least > similarity
    saved = torch.tensor([last - first for first, last in stretches], device=alike.device)
    left = int((saved + 1).sum()) * patches - int((static.sum(1) * saved).sum())
    order = least.masked_fill(~static, torch.inf).flatten().argsort(stable=True)[: int(static.sum())]
    given_back = saved[order // patches]
    before = left + given_back.cumsum(0) - given_back
    static.view(-1)[order[before < kept]] = False
    return static


def _groups(stretches: list[tuple[int, int]], static: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Tokens that are clustered with one another: their places, of static ones in the first of so many frames."""
    groups, patches = [], static.shape[1]
    for (first, last), still in zip(stretches, static, strict=True):
        groups.append((first * patches + still.nonzero()[:, 0], last - first + 1))
        moving = (~still).nonzero()[:, 0]
        groups += [(frame * patches + moving, 1) for frame in range(first, last + 1)]
    return groups


METHOD = Holitom()
