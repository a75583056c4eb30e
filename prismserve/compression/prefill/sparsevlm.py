"""SparseVLM: text tokens that look at the picture rate its tokens at three layers; the best of the dropped are recycled.

Source: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025
(arXiv:2410.04417), and its published code; ``v2`` is the code's SparseVLM+.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal

import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig, Share, Stage
from prismserve.compression.cuts import RATERS_MAX, Cut, CutNeed, CutPlan, Raters, Tap
from prismserve.compression.density import density_centres
from prismserve.compression.prefill._common import best_first, fold_into, geometric, given, layers_at, top

if TYPE_CHECKING:
    from prismserve.compression.cuts import CutInputs

_LAYERS: Final = (2 / 32, 6 / 32, 15 / 32)
_EXPONENTS: Final = (0.394, 0.639, 1.0)
_RECYCLED: Final = 0.3
_PER_CENTRE: Final = 10
_HEADS: Final = 14 / 32


class SparseVlmConfig(KeepConfig):
    """Budget and variant.

    Attributes:
        keep: visual tokens left behind the last cut, recycled ones included.
        variant: ``v1`` recycles; ``v2`` removes the decay of attention with distance and asks fewer heads instead.
    """

    keep: int | float = Field(default=110 / 576, gt=0)
    variant: Literal["v1", "v2"] = "v1"


class SparseVlm:
    """Keep what the raters look at, mean over heads and raters of layer c-1's attention; merge the best of the rest.

    Raters are chosen once on decoder inputs: text tokens behind the last image whose mean over visual tokens of
    ``softmax_text(H_v H_t^T)`` is above average. ``v1``: of the tokens dropped at a cut, the best 30 % are clustered into
    a tenth as many centres plus one by DPC-KNN and averaged; each centre keeps the place of the token it grew from.
    ``v2``: attention is divided by what position alone would give (queries and keys of ones), only the 14 of 32 heads
    with most text-to-image mass are asked, nothing is recycled.

    Cuts lie at 2, 6 and 15 of 32 layers, in proportion for other depths. Counts fall along the curve of the published
    table for 192 tokens (576 to 300, 200, 110); the paper's rank-adaptive count is not offered, since room must be known
    beforehand and the published code uses the table as well. The budget includes the recycled tokens, which the code
    adds on top. The paper sums a cluster, the code averages it; we average. The code renumbers positions (v1); here
    survivors keep theirs (``P-keep``). At most 256 raters, the strongest, are asked.
    """

    name: ClassVar[str] = "sparsevlm"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "IV-A.1a"
    source: ClassVar[str] = "Zhang et al., SparseVLM, ICML 2025, arXiv:2410.04417"
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.QUERY
    nested: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    Config: ClassVar[type[SparseVlmConfig]] = SparseVlmConfig

    def cuts(self, config: SparseVlmConfig, layers: int) -> tuple[Cut, ...]:
        """Three, at the paper's shares of the depth."""
        needs = frozenset({CutNeed.HIDDEN} if config.variant == "v1" else {CutNeed.ROPE_SCORES})
        return tuple(Cut(layer, Tap.BEFORE, Raters.CHOSEN, needs) for layer in layers_at(_LAYERS, layers))

    def kept_tokens(self, config: SparseVlmConfig, layers: int, tokens: int) -> tuple[int, ...]:  # noqa: ARG002
        """The published curve, ending with the budget."""
        return geometric(tokens, min(tokens, config.kept(tokens)), _EXPONENTS)

    def raters(self, visual: torch.Tensor, text: torch.Tensor, config: SparseVlmConfig) -> torch.Tensor:  # noqa: ARG002
        """Text tokens that more of the picture belongs to than to the average one."""
        ratings = (visual.float() @ text.float().T).softmax(1).mean(0)
        chosen = (ratings > ratings.mean()).nonzero()[:, 0]
        if len(chosen) == 0:
            return torch.arange(len(ratings), device=text.device)[-RATERS_MAX:]
        return chosen[top(ratings[chosen], RATERS_MAX)]

    def plan(self, cut: int, inputs: CutInputs, config: SparseVlmConfig) -> CutPlan:
        """Rank by the raters, then recycle."""
        kept = self.kept_tokens(config, inputs.layers, inputs.history[0])[cut]
        scores = given(inputs.scores, "the raters' attention")
        if config.variant == "v2":
            heads = top(scores.sum((0, 2)), max(1, round(_HEADS * scores.shape[1])))
            position = given(inputs.rope_scores, "attention by position alone").clamp_min(1e-12)
            return CutPlan(top((scores[:, heads].mean(1) / position).mean(0), kept))
        ratings = scores.mean((0, 1))
        order = best_first(ratings)
        straight = _straight(kept, inputs.tokens)
        centres = kept - straight
        if centres == 0:
            return CutPlan(order[:kept].sort().values)
        pool = order[straight : straight + _pool(straight, inputs.tokens)].sort().values
        features = given(inputs.hidden, "hidden states")[pool].float()
        chosen, nearest = density_centres(features, centres)
        indices = torch.cat((order[:straight], pool[chosen])).sort().values
        number = torch.full((inputs.tokens,), -1, device=indices.device)
        number[indices] = torch.arange(kept, device=indices.device)
        joins = torch.full((inputs.tokens,), -1, device=indices.device)
        joins[pool] = number[pool[chosen[nearest]]]
        targets, weights = fold_into(inputs.tokens, indices, joins, torch.ones_like(ratings))
        return CutPlan(indices, targets, weights)


def _pool(straight: int, tokens: int) -> int:
    """Dropped tokens that are recycled."""
    return round(_RECYCLED * (tokens - straight))


def _straight(kept: int, tokens: int) -> int:
    """Tokens kept as they are, so that they and the centres of the recycled ones are ``kept`` together."""
    for straight in range(kept, 0, -1):
        pool = _pool(straight, tokens)
        if pool and straight + pool // _PER_CENTRE + 1 <= kept:
            return straight if kept - straight <= pool else kept
    return kept


METHOD = SparseVlm()
