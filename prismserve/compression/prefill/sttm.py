"""STTM: a quadtree over each frame, then merging of equal regions over time, on hidden states alone.

Source: Hyun et al., "Multi-Granular Spatio-Temporal Token Merging for Training-Free Acceleration of Video LLMs", ICCV
2025 (arXiv:2507.07990), and its published code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from prismserve.compression.base import Share, Stage
from prismserve.compression.cuts import Cut, CutNeed, CutPlan
from prismserve.compression.prefill._common import checked_layer, fold_into, given
from prismserve.core.config import FrozenConfig

if TYPE_CHECKING:
    from prismserve.compression.cuts import CutInputs, Grid


class SttmConfig(FrozenConfig):
    """Thresholds and place.

    Attributes:
        spatial: cosine of a region with each of its four parts at which it is not divided (tau_s).
        temporal: cosine of regions of consecutive frames at which they merge (tau_t).
        layer: decoder layer before which tokens merge.
    """

    spatial: float = Field(default=0.85, ge=-1.0, strict=True, allow_inf_nan=False)
    temporal: float = Field(default=0.55, ge=-1.0, strict=True, allow_inf_nan=False)
    layer: int = Field(default=2, ge=0, le=1023, strict=True)


class Sttm:
    """Each frame becomes the coarsest quadtree whose regions look like their parts; regions of equal look merge in time.

    Regions are aligned squares of side 2^l, cut at the frame's edge, from the level on which a frame is about 2 x 2; a
    region's feature is the mean of its tokens. Regions of consecutive frames one of which contains the other merge when
    their cosine is at least ``temporal``, transitively; what has merged becomes the mean of all its tokens in the place
    of the earliest of them (the paper's "survived" positions; its code reassigns them, which M-RoPE does not allow).
    Thresholds are the paper's for a budget of half the tokens; above 1 nothing merges.

    Only visual tokens and what came before them matter (``AGN*``). How many are left follows from the content. It needs
    every token of a frame's grid, so no visual method may come before it.
    """

    name: ClassVar[str] = "sttm"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Hyun et al., STTM, ICCV 2025, arXiv:2507.07990"
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.AGNOSTIC_IN_MODEL
    nested: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    Config: ClassVar[type[SttmConfig]] = SttmConfig

    def cuts(self, config: SttmConfig, layers: int) -> tuple[Cut, ...]:
        """One."""
        return (Cut(checked_layer(config.layer, layers), needs=frozenset({CutNeed.HIDDEN})),)

    def kept_tokens(self, config: SttmConfig, layers: int, tokens: int) -> tuple[int, ...]:  # noqa: ARG002
        """At most all."""
        return (tokens,)

    def plan(self, cut: int, inputs: CutInputs, config: SttmConfig) -> CutPlan:  # noqa: ARG002 - there is one cut
        """Medium by medium."""
        hidden = given(inputs.hidden, "hidden states").float()
        leaders: list[torch.Tensor] = []
        first = 0
        for grid in inputs.grids:
            tokens = hidden[first : first + grid.tokens]
            leaders.append(_leaders(tokens, grid, config).to(hidden.device) + first)
            first += grid.tokens
        leader = torch.cat(leaders)
        indices = leader.unique()  # type: ignore[no-untyped-call]
        number = torch.searchsorted(indices, leader)
        return CutPlan(indices, *fold_into(inputs.tokens, indices, number, inputs.sizes))


def _leaders(tokens: torch.Tensor, grid: Grid, config: SttmConfig) -> torch.Tensor:
    """[n] int64: the first token of what each token merges with."""
    index = torch.arange(grid.tokens, device=tokens.device)
    frame, row, column = (
        index // (grid.rows * grid.columns),
        index // grid.columns % grid.rows,
        index % grid.columns,
    )
    node = _quadtree(tokens, (frame, row, column), grid, config.spatial)
    means = _means(tokens, node, grid.tokens)
    step = grid.rows * grid.columns
    root = list(range(grid.tokens))

    def find(item: int) -> int:
        while root[item] != item:
            root[item] = root[root[item]]
            item = root[item]
        return item

    if grid.frames > 1:
        before, after = node[:-step], node[step:]
        close = functional.cosine_similarity(means[before], means[after], dim=1) >= config.temporal
        for one, other in zip(before[close].tolist(), after[close].tolist(), strict=True):
            low, high = sorted((find(one), find(other)))
            root[high] = low
    return torch.tensor([find(item) for item in node.tolist()], dtype=torch.int64)


def _quadtree(
    tokens: torch.Tensor, place: tuple[torch.Tensor, torch.Tensor, torch.Tensor], grid: Grid, threshold: float
) -> torch.Tensor:
    """[n] int64: the first token of the region each token lies in."""
    frame, row, column = place
    top = 0
    while max(grid.rows, grid.columns) > 2 << top:
        top += 1
    levels = [
        (frame * grid.rows + (row >> level << level)) * grid.columns + (column >> level << level)
        for level in range(top + 1)
    ]
    node = levels[0]
    done = torch.zeros(grid.tokens, dtype=torch.bool, device=tokens.device)
    for level in range(top, 0, -1):
        parent, child = levels[level], levels[level - 1]
        parents, children = _means(tokens, parent, grid.tokens), _means(tokens, child, grid.tokens)
        unlike = functional.cosine_similarity(parents[parent], children[child], dim=1) < threshold
        divided = torch.zeros(grid.tokens, device=tokens.device).index_add(0, parent, unlike.float())[parent] > 0
        stops = ~done & ~divided
        node = torch.where(stops, parent, node)
        done |= stops
    return node


def _means(tokens: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """[count, D] mean of the tokens of each group, 0 where there is none."""
    sums = torch.zeros((count, tokens.shape[1]), device=tokens.device).index_add(0, groups, tokens)
    return sums / torch.bincount(groups, minlength=count).clamp_min(1)[:, None]


METHOD = Sttm()
