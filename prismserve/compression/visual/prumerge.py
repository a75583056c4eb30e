"""PruMerge and PruMerge+: keep the patches the class token attends to, fold their neighbours into them.

Source: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025
(arXiv:2403.15388), section 3, and its published code.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, ascending, class_attention, key_metric, ranked
from prismserve.kernels.subsets import fold_nearest


class PruMergeConfig(KeepConfig):
    """Parameters of PruMerge.

    Attributes:
        plus: whether ``spatial`` of the budget goes to an even stride over the patches that are left (PruMerge+).
        spatial: that share; in the paper's PruMerge+ about three of four tokens are such.
        neighbours: how many tokens, the most similar by key, are folded into each kept one; the paper has 32.
        merge: ``mean`` adds the neighbours weighted by attention and divides by the weights' sum, where the kept token
            weighs 1; ``sum`` leaves the division out, as the published code does; ``none`` keeps the token alone.
    """

    plus: bool = Field(default=False, strict=True)
    spatial: float = Field(default=0.75, ge=0.0, le=1.0, strict=True, allow_inf_nan=False)
    neighbours: int = Field(default=32, ge=1, le=4096, strict=True)
    merge: Literal["mean", "sum", "none"] = "mean"


class PruMerge(Reducing):
    """Top patches by class-token attention, each with the attention-weighted sum of its nearest by key.

    The paper chooses how many to keep from the image (outliers of the attention beyond the third quartile plus 1.5
    interquartile ranges). A router must know the number before the image is encoded, so here ``keep`` fixes it, and
    in PruMerge+ it also fixes how many come from the even stride.

    Other differences: attention is the mean over heads of each head's softmax, where the published code takes one
    softmax over the full width; survivors stand in raster order with their own positions; the extra token in which
    the code sums up everything that was dropped is left out, since it has no place in the grid. Encoders without a
    class token provide the mean attention received.
    """

    name: ClassVar[str] = "prumerge"
    section: ClassVar[str] = "IV-A.1a"
    source: ClassVar[str] = "Shang et al., LLaVA-PruMerge, ICCV 2025, arXiv:2403.15388"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLS_ATTENTION, Need.ENCODER_KEYS})
    Config: ClassVar[type[PruMergeConfig]] = PruMergeConfig

    def plan(self, features: VisualFeatures, config: PruMergeConfig) -> VisualPlan:
        """``indices`` [k], and ``weights`` [k, N] unless nothing is merged."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        attention = class_attention(features)
        count = attention.shape[0]
        kept = self.kept_tokens(config, count)
        spread = round(config.spatial * kept) if config.plus else 0
        order = ranked(attention)
        chosen = order[: kept - spread]
        if spread:
            rest = ascending(order[kept - spread :])
            steps = torch.arange(spread, device=rest.device)
            chosen = torch.cat((chosen, rest[(2 * steps + 1) * rest.shape[0] // (2 * spread)]))
        indices = ascending(chosen)
        if config.merge == "none":
            return VisualPlan(indices)
        nearest, mean = min(config.neighbours, count - 1), config.merge == "mean"
        return VisualPlan(indices, fold_nearest(key_metric(features), indices, attention, nearest, mean=mean))


METHOD = PruMerge()
