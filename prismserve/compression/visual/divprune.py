"""DivPrune: the subset whose nearest two tokens are as far apart as can be.

Source: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025
(arXiv:2503.02175), algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, cosine_kernel, projected


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
        distance = 1.0 - cosine_kernel(projected(features))
        kept = self.kept_tokens(config, distance.shape[0])
        chosen = torch.empty(kept, dtype=torch.int64, device=distance.device)
        chosen[0] = distance.clone().fill_diagonal_(torch.inf).amin(1).argmax()
        nearest = distance[chosen[0]].clone()
        for i in range(1, kept):
            nearest[chosen[:i]] = -torch.inf
            chosen[i] = nearest.argmax()
            nearest = torch.minimum(nearest, distance[chosen[i]])
        return VisualPlan.in_order(chosen)


METHOD = DivPrune()
