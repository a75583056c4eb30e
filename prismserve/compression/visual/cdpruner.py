"""CDPruner: the most diverse subset of tokens, given what the question asks for.

Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
NeurIPS 2025 (arXiv:2506.10967), section 3.3, and its published code.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from prismserve.compression.base import KeepConfig, Need, Share, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, ascending, projected
from prismserve.kernels.subsets import largest_determinant

_LEAST: float = 1e-3
"""Relevance of the least relevant token: the kernel stays positive definite on the rest."""


class CDPrunerConfig(KeepConfig):
    """Parameters of CDPruner.

    Attributes:
        emphasis: the published code's knob, 0 to 1 without 1: relevance r becomes exp(a r) with
            a = emphasis / (2 (1 - emphasis)); 0 leaves it as it is.
    """

    emphasis: float = Field(default=0.0, ge=0.0, lt=1.0, strict=True, allow_inf_nan=False)


class CDPruner(Reducing):
    """Greedy determinant maximisation over ``diag(r) S diag(r)``: S cosines of projected tokens, r relevance.

    The paper takes relevance from CLIP's text tower. The checkpoints of language models that see do not hold one, so
    here it is the cosine between a projected token and the decoder's embeddings of the question, mean over the
    question's tokens, scaled to (0, 1] within the image (the published code scales within the batch, which would make
    an image depend on its neighbours). How well a model's projector and embeddings are aligned decides how much that
    is worth. ``dpp`` is the same without the question.

    Depends on the question: results are kept under keys that hold its tokens. Without any text, r is 1.
    """

    name: ClassVar[str] = "cdpruner"
    section: ClassVar[str] = "IV-A.1a"
    source: ClassVar[str] = "Zhang et al., CDPruner, NeurIPS 2025, arXiv:2506.10967"
    share: ClassVar[Share] = Share.QUERY
    nested: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROJECTED, Need.TEXT_EMBEDDINGS})
    Config: ClassVar[type[CDPrunerConfig]] = CDPrunerConfig

    def plan(self, features: VisualFeatures, config: CDPrunerConfig) -> VisualPlan:
        """The k chosen, in raster order; nothing is merged."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        tokens = projected(features)
        relevance = question_relevance(tokens, features.text)
        if config.emphasis > 0.0:
            relevance = (config.emphasis / (2.0 * (1.0 - config.emphasis)) * relevance).exp()
        kept = self.kept_tokens(config, tokens.shape[0])
        return VisualPlan(ascending(largest_determinant(tokens, kept, relevance)))


def question_relevance(tokens: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
    """[N] float32 in (0, 1]: mean cosine of projected tokens [N, D] with text embeddings [M, D], scaled."""
    if text is None or text.shape[0] == 0:
        return tokens.new_ones(tokens.shape[0])
    similarity = functional.normalize(tokens, dim=-1) @ functional.normalize(text.float(), dim=-1).T
    score = similarity.mean(1)
    spread = score.max() - score.min()
    if spread <= 0.0:
        return torch.ones_like(score)
    return _LEAST + (1.0 - _LEAST) * (score - score.min()) / spread


METHOD = CDPruner()
