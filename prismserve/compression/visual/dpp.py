"""CDPruner with every relevance 1: diversity alone, which depends on the image alone and can be shared.

Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
NeurIPS 2025 (arXiv:2506.10967), section 3.2.
"""

from __future__ import annotations

from typing import ClassVar

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, projected
from prismserve.kernels.subsets import largest_determinant


class Determinantal(Reducing):
    """The subset of projected tokens whose cosine similarities have the largest determinant, chosen greedily."""

    name: ClassVar[str] = "dpp"
    section: ClassVar[str] = "IV-A.1a"
    source: ClassVar[str] = "Zhang et al., CDPruner, NeurIPS 2025, arXiv:2506.10967 (without the question)"
    nested: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROJECTED})
    Config: ClassVar[type[KeepConfig]] = KeepConfig

    def plan(self, features: VisualFeatures, config: KeepConfig) -> VisualPlan:
        """The k chosen, in raster order; nothing is merged."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        tokens = projected(features)
        return VisualPlan.in_order(largest_determinant(tokens, self.kept_tokens(config, tokens.shape[0])))


METHOD = Determinantal()
