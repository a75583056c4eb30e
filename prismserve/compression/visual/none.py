"""Keep every visual token."""

from __future__ import annotations

from typing import ClassVar

import torch

from prismserve.compression.base import KeepConfig, Need, Share, Stage, VisualFeatures, VisualPlan


class NoCompression:
    """The identity."""

    name: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.VISUAL
    share: ClassVar[Share] = Share.AGNOSTIC
    nested: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()
    Config: ClassVar[type[KeepConfig]] = KeepConfig

    def kept_tokens(self, config: KeepConfig, tokens: int) -> int:  # noqa: ARG002 - the budget is always all
        """All of them."""
        return tokens

    def plan(self, features: VisualFeatures, config: KeepConfig) -> VisualPlan:  # noqa: ARG002
        """Every index, no merging."""
        return VisualPlan(torch.arange(features.tokens.shape[0], device=features.tokens.device))


METHOD = NoCompression()
