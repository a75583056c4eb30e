"""HoliTom's inner stage: drop by the last token's attention deep in the decoder, averaging the dropped into survivors.

Source: Shao et al., "HoliTom: Holistic Token Merging for Fast Video Large Language Models" (arXiv:2505.21334), section
3.3 ("M"), and its published code. The outer stage, before the decoder, is a visual method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from prismserve.compression.base import KeepConfig, Share, Stage
from prismserve.compression.cuts import Cut, CutNeed, CutPlan, Raters, Tap
from prismserve.compression.prefill._common import fold_into, given, layers_at, top

if TYPE_CHECKING:
    from prismserve.compression.cuts import CutInputs


class HolitomInnerConfig(KeepConfig):
    """Budget and place.

    Attributes:
        keep: visual tokens that go on.
        depth: share of the layers that see all of them; layer 18 of 28 in the paper.
    """

    keep: int | float = Field(default=0.5, gt=0)
    depth: float = Field(default=18 / 28, gt=0.0, lt=1.0, strict=True, allow_inf_nan=False)


class HolitomInner:
    """Keep the largest of the last row's attention (mean over heads); a dropped token joins the survivor most like it.

    Likeness is the cosine of hidden states. The published code averages one dropped token after the other into its
    survivor, so that its result depends on their order; here a survivor becomes the mean of all that joined it, weighted
    by how many tokens each stands for. Survivors keep their positions. ``QRY``.
    """

    name: ClassVar[str] = "holitom_inner"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Shao et al., HoliTom, NeurIPS 2025, arXiv:2505.21334"
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.QUERY
    nested: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    Config: ClassVar[type[HolitomInnerConfig]] = HolitomInnerConfig

    def cuts(self, config: HolitomInnerConfig, layers: int) -> tuple[Cut, ...]:
        """One."""
        (layer,) = layers_at([config.depth], layers)
        return (Cut(layer, Tap.BEFORE, Raters.LAST, frozenset({CutNeed.HIDDEN})),)

    def kept_tokens(self, config: HolitomInnerConfig, layers: int, tokens: int) -> tuple[int, ...]:  # noqa: ARG002
        """Exactly the budget."""
        return (min(tokens, config.kept(tokens)),)

    def plan(self, cut: int, inputs: CutInputs, config: HolitomInnerConfig) -> CutPlan:  # noqa: ARG002 - there is one
        """Rank, then let the dropped join."""
        scores = given(inputs.scores, "the last row's attention")[-1].mean(0)
        indices = top(scores, min(inputs.tokens, config.kept(inputs.tokens)))
        if len(indices) == inputs.tokens:
            return CutPlan(indices)
        normal = functional.normalize(given(inputs.hidden, "hidden states").float(), dim=1)
        likest: torch.Tensor = (normal @ normal[indices].T).argmax(1)
        return CutPlan(indices, *fold_into(inputs.tokens, indices, likest, inputs.sizes))


METHOD = HolitomInner()
