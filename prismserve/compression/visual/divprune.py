"""DivPrune: the subset whose nearest two tokens are as far apart as can be.

Source: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025
(arXiv:2503.02175), algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, projected
from prismserve.kernels.subsets import farthest_first


class DivPrune(Reducing):
    """Greedy max-min selection by cosine distance over projected tokens.

    The first pick is the token whose nearest neighbour is farthest; each next one is the token farthest from its
    nearest among those chosen. Survivors keep their positions, where the published code writes them one after another.
    The set is chosen per image. Depends on the image alone; ties go to the lower index.
    """

    name: ClassVar[str] = "divprune"
    section: ClassVar[str] = "IV-A.1a"
    source: ClassVar[str] = "Alvar et al., DivPrune, CVPR 2025, arXiv:2503.02175"
    nested: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROJECTED})
    Config: ClassVar[type[KeepConfig]] = KeepConfig

    def plan(self, features: VisualFeatures, config: KeepConfig) -> VisualPlan:
        """The k chosen, in raster order; nothing is merged."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        tokens = projected(features)
        return VisualPlan.in_order(farthest_first(tokens, self.kept_tokens(config, tokens.shape[0])))


METHOD = DivPrune()
