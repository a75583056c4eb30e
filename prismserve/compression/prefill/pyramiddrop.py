"""PyramidDrop: fewer visual tokens after each stage of the decoder, ranked by the prompt's last token.

Source: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", CVPR 2025 (arXiv:2410.17247), section 3.2, and its published code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from prismserve.compression.base import KeepConfig, Share, Stage
from prismserve.compression.cuts import Cut, CutPlan, Raters, Tap
from prismserve.compression.prefill._common import geometric, given, layers_at, top

if TYPE_CHECKING:
    from prismserve.compression.cuts import CutInputs


class PyramidDropConfig(KeepConfig):
    """Budget and stages.

    Attributes:
        keep: visual tokens left behind the last cut; the cuts before it leave a geometric row of counts.
        stages: parts of equal depth the decoder is divided into; a cut lies between two of them.
    """

    keep: int | float = Field(default=0.125, gt=0)
    stages: int = Field(default=4, ge=2, le=64, strict=True)


class PyramidDrop:
    """At each cut keep the visual tokens that the last prompt token would look at most in the layer behind it.

    The score takes queries and keys of the *next* layer (its input norm, projections and RoPE applied to the hidden
    states), mean over heads of the softmax over all keys, as the published code does; FastV takes the attention of the
    layer before. Defaults are the paper's: cuts at 1/4, 1/2 and 3/4 of the depth (8, 16, 24 of 32), half of the tokens
    leaving at each. The published code renumbers positions behind every cut; here survivors keep theirs, which M-RoPE
    needs and which costs nothing (``P-keep``).

    The score row belongs to the question (``QRY``); layers below the first cut do not depend on it.
    """

    name: ClassVar[str] = "pyramiddrop"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "IV-A.1a"
    source: ClassVar[str] = "Xing et al., PyramidDrop, CVPR 2025, arXiv:2410.17247"
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.QUERY
    nested: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    Config: ClassVar[type[PyramidDropConfig]] = PyramidDropConfig

    def cuts(self, config: PyramidDropConfig, layers: int) -> tuple[Cut, ...]:
        """Between the stages."""
        shares = [stage / config.stages for stage in range(1, config.stages)]
        return tuple(Cut(layer, Tap.AFTER, Raters.LAST) for layer in layers_at(shares, layers))

    def kept_tokens(self, config: PyramidDropConfig, layers: int, tokens: int) -> tuple[int, ...]:  # noqa: ARG002
        """A geometric row that ends with the budget."""
        cuts = config.stages - 1
        return geometric(tokens, min(tokens, config.kept(tokens)), [(cut + 1) / cuts for cut in range(cuts)])

    def plan(self, cut: int, inputs: CutInputs, config: PyramidDropConfig) -> CutPlan:
        """The largest means over heads of the last row."""
        scores = given(inputs.scores, "the last row's attention")[-1].mean(0)
        return CutPlan(top(scores, self.kept_tokens(config, inputs.layers, inputs.history[0])[cut]))


METHOD = PyramidDrop()
