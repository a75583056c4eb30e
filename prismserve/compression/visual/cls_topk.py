"""Keep the patches the class token attends to most: the plain form of what most selectors refine, and a control."""

from __future__ import annotations

from typing import ClassVar

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, class_attention, ranked


class ClassAttention(Reducing):
    """Top k by class-token attention, mean over heads; nothing is merged.

    Encoders without a class token provide the mean attention a patch receives.
    """

    name: ClassVar[str] = "cls_topk"
    section: ClassVar[str] = "control"
    source: ClassVar[str] = ""
    nested: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLS_ATTENTION})
    Config: ClassVar[type[KeepConfig]] = KeepConfig

    def plan(self, features: VisualFeatures, config: KeepConfig) -> VisualPlan:
        """The k most attended, in raster order."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        order = ranked(class_attention(features))
        return VisualPlan.in_order(order[: self.kept_tokens(config, order.shape[0])])


METHOD = ClassAttention()
