"""FrameFusion: merge what stays the same from frame to frame in the first layers, then prune to a cost target.

Source: Fu et al., "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Visual Language
Models", ICCV 2025 (arXiv:2501.01986), and its published code.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from prismserve.compression.base import Share, Stage
from prismserve.compression.cuts import Cut, CutNeed, CutPlan, Raters, Tap
from prismserve.compression.prefill._common import fold_into, given, top
from prismserve.core.config import FrozenConfig

if TYPE_CHECKING:
    from prismserve.compression.cuts import CutInputs


class FrameFusionConfig(FrozenConfig):
    """Cost target and thresholds.

    Attributes:
        cost: mean over the layers of the share of visual tokens that are left, 0.3 in the code.
        similarity: cosine at which a token joins the one before it in time.
        ratio: a round that merges a smaller share of the tokens is the last one.
        rounds: most rounds of merging; the layer behind them prunes at the latest.
    """

    cost: float = Field(default=0.3, gt=0.0, le=1.0, strict=True, allow_inf_nan=False)
    similarity: float = Field(default=0.6, ge=-1.0, le=1.0, strict=True, allow_inf_nan=False)
    ratio: float = Field(default=0.1, gt=0.0, lt=1.0, strict=True, allow_inf_nan=False)
    rounds: int = Field(default=4, ge=1, le=64, strict=True)


class FrameFusion:
    """Rounds of merging before layers 0, 1, ...; then one cut by the last row's attention that meets ``cost``.

    A round compares each token with the one before it in time at the same patch; runs of tokens whose hidden states
    have a cosine of at least ``similarity`` become the mean of the run, in the place of its first token. If that would
    take more than the target asks for, only the most similar join. When a round merges a share below ``ratio``, or
    ``rounds`` are over, the next layer prunes by attention what is still above the target. The number of layers is the
    model's own (the code says 28). A mean over a run is weighted by how many tokens each stands for.

    Merging alone depends on the media (``AGN*``), the cut that follows on the question, so the whole is ``QRY``. On
    images there is nothing to merge, and it prunes. Survivors keep their positions. How many tokens are left behind the
    last cut follows from the content and is bounded by the target.
    """

    name: ClassVar[str] = "framefusion"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Fu et al., FrameFusion, ICCV 2025, arXiv:2501.01986"
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.QUERY
    nested: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    Config: ClassVar[type[FrameFusionConfig]] = FrameFusionConfig

    def cuts(self, config: FrameFusionConfig, layers: int) -> tuple[Cut, ...]:
        """Before layers 0 to ``rounds``, as far as there are layers."""
        last = min(config.rounds, layers - 1)
        hidden = frozenset({CutNeed.HIDDEN})
        later = (Cut(layer, Tap.BEFORE, Raters.LAST, hidden) for layer in range(1, last + 1))
        return (Cut(0, needs=hidden), *later)

    def kept_tokens(self, config: FrameFusionConfig, layers: int, tokens: int) -> tuple[int, ...]:
        """At most all of them until the last cut, at most what the target allows behind it."""
        last = min(config.rounds, layers - 1)
        bound = math.ceil(config.cost * layers * tokens / max(1, layers - last))
        return (*([tokens] * last), min(tokens, max(1, bound)))

    def plan(self, cut: int, inputs: CutInputs, config: FrameFusionConfig) -> CutPlan:
        """Merge, prune or leave alone, as the counts so far say."""
        target = _target(inputs, config)
        history = inputs.history
        ended = next((i for i in range(cut) if history[i + 1] > (1 - config.ratio) * history[i]), None)
        last = cut == min(config.rounds, inputs.layers - 1)
        if ended is not None and ended < cut - 1:
            return CutPlan(torch.arange(inputs.tokens, device=inputs.places.device))
        if cut and (ended == cut - 1 or last):
            scores = given(inputs.scores, "the last row's attention")[-1].mean(0)
            return CutPlan(top(scores, min(inputs.tokens, target)))
        return _merge(inputs, config, max(0, inputs.tokens - target))


def _target(inputs: CutInputs, config: FrameFusionConfig) -> int:
    """Tokens in this and all further layers that meet the cost: ``sum_l n_l = cost * layers * N``."""
    spent, below = 0, 0
    for layer, tokens in zip(inputs.cut_layers, inputs.history, strict=True):
        spent += (layer - below) * tokens
        below = layer
    left = config.cost * inputs.layers * inputs.history[0] - spent
    return max(1, math.floor(left / (inputs.layers - below)))


def _merge(inputs: CutInputs, config: FrameFusionConfig, most: int) -> CutPlan:
    """Runs of like tokens at one patch over time, at most ``most`` tokens absorbed."""
    area = torch.tensor([grid.rows * grid.columns for grid in inputs.grids], device=inputs.places.device)
    area = area[inputs.medium]
    patch, frame = inputs.places % area, inputs.places // area
    width, depth = int(area.max()), int(frame.max()) + 1
    order = ((inputs.medium * width + patch) * depth + frame).argsort(stable=True)
    hidden = functional.normalize(given(inputs.hidden, "hidden states").float(), dim=1)[order]
    same = (inputs.medium[order].diff() == 0) & (patch[order].diff() == 0)
    alike = (hidden[1:] * hidden[:-1]).sum(1).masked_fill(~same, -torch.inf)
    joins = alike >= config.similarity
    if int(joins.sum()) > most:
        joins &= torch.zeros_like(joins).scatter(0, alike.argsort(descending=True, stable=True)[:most], value=True)
    starts = torch.cat((torch.ones(1, dtype=torch.bool, device=joins.device), ~joins))
    heads = order[starts]
    indices = heads.sort().values
    number = torch.empty(inputs.tokens, dtype=torch.int64, device=order.device)
    number[indices] = torch.arange(len(indices), device=order.device)
    run = torch.empty_like(order)
    run[order] = number[heads[starts.cumsum(0) - 1]]
    return CutPlan(indices, *fold_into(inputs.tokens, indices, run, inputs.sizes))


METHOD = FrameFusion()
