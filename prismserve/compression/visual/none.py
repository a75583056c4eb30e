"""Keep every visual token."""

from __future__ import annotations

from typing import ClassVar

import torch

from prismserve.compression.base import Need, Share, Stage, VisualFeatures, VisualPlan
from prismserve.core.config import FrozenConfig


class NoParameters(FrozenConfig):
    """There is nothing to set."""


class NoCompression:
    """The identity."""

    name: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.VISUAL
    section: ClassVar[str] = "control"
    source: ClassVar[str] = ""
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.AGNOSTIC
    nested: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()
    Config: ClassVar[type[FrozenConfig]] = NoParameters

    def kept_tokens(self, config: FrozenConfig, tokens: int) -> int:  # noqa: ARG002 - the budget is always all
        """All of them."""
        return tokens

    def plan(self, features: VisualFeatures, config: FrozenConfig) -> VisualPlan:  # noqa: ARG002
        """Every index, no merging."""
        return VisualPlan(torch.arange(features.tokens.shape[0], device=features.tokens.device))


METHOD = NoCompression()
