"""Uniform pruning: an even stride over the raster, a control that looks at nothing."""

from __future__ import annotations

from typing import ClassVar

import torch

from prismserve.compression.base import KeepConfig, Need, Share, Stage, VisualFeatures, VisualPlan


class UniformPruning:
    """Survivor i of k is the patch in the middle of the i-th of k equal parts of the raster order."""

    name: ClassVar[str] = "uniform"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.VISUAL
    section: ClassVar[str] = "control"
    source: ClassVar[str] = ""
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.AGNOSTIC
    nested: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()
    Config: ClassVar[type[KeepConfig]] = KeepConfig

    def kept_tokens(self, config: KeepConfig, tokens: int) -> int:
        """Exactly ``config.kept(tokens)``."""
        return config.kept(tokens)

    def plan(self, features: VisualFeatures, config: KeepConfig) -> VisualPlan:
        """Indices at an even stride; nothing is merged."""
        count = features.tokens.shape[0]
        kept = self.kept_tokens(config, count)
        steps = torch.arange(kept, device=features.tokens.device)
        return VisualPlan((2 * steps + 1) * count // (2 * kept))


METHOD = UniformPruning()
