"""VisPruner: some tokens because they matter, the others because they differ.

Source: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV
2025 (arXiv:2412.01818), section 3.3, and its published code.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, ascending, class_attention, ranked
from prismserve.kernels.subsets import drop_alike


class VisPrunerConfig(KeepConfig):
    """Parameters of VisPruner.

    Attributes:
        important: share of the kept tokens that are chosen by attention; the others are chosen for being different.
        removed_per_round: how many duplicates leave at a time; the published code has 8.
    """

    important: float = Field(default=0.5, ge=0.0, le=1.0, strict=True, allow_inf_nan=False)
    removed_per_round: int = Field(default=8, ge=1, le=4096, strict=True)


class VisPruner(Reducing):
    """Important tokens by class-token attention, diverse ones by removing near-duplicates from the rest.

    In each round the rest, in raster order, is split alternately into A and B; the tokens of A most similar (cosine
    of the encoder's features) to any of B leave. Nothing is merged, as in the published code, although the survey
    says so. Survivors keep their positions. Encoders without a class token provide the mean attention received.
    """

    name: ClassVar[str] = "vispruner"
    section: ClassVar[str] = "IV-A.1b"
    source: ClassVar[str] = "Zhang et al., VisPruner, ICCV 2025, arXiv:2412.01818"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLS_ATTENTION})
    Config: ClassVar[type[VisPrunerConfig]] = VisPrunerConfig

    def plan(self, features: VisualFeatures, config: VisPrunerConfig) -> VisualPlan:
        """The k chosen, in raster order."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        kept = self.kept_tokens(config, features.tokens.shape[0])
        order = ranked(class_attention(features))
        important = round(config.important * kept)
        rest = ascending(order[important:])
        different = drop_alike(features.tokens.float(), rest, kept - important, config.removed_per_round)
        return VisualPlan(ascending(torch.cat((order[:important], different))))


METHOD = VisPruner()
