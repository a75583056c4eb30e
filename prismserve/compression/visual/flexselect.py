"""FlexSelect, with the model as its own selector: what a middle layer of the decoder looks at, before the real prefill.

Source: Zhang et al., "FlexSelect: Flexible Token Selection for Efficient Long Video Understanding", NeurIPS 2025
(arXiv:2506.00993), section 3.1, and its published code.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from prismserve.compression.base import KeepConfig, Need, Reduction, Share, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, ascending, ranked
from prismserve.compression.visual._video import middles
from prismserve.core.errors import EngineError


class FlexSelectConfig(KeepConfig):
    """Parameters of FlexSelect.

    Attributes:
        depth: of the reference layer, as a share of the decoder's layers: 19 of 28 in LLaVA-Video-7B.
        reduction: how the rows of the question and the heads are taken together; the published code has both.
        selector: who ranks. ``self`` is the model itself, up to the reference layer; the small trained selector (``lite``) is
            a method of its own, ``flexselect_lite``, because it needs weights.
    """

    depth: float = Field(default=19 / 28, ge=0.0, lt=1.0, strict=True, allow_inf_nan=False)
    reduction: Reduction = "mean"
    selector: Literal["self", "lite"] = "self"

    @field_validator("selector")
    @classmethod
    def _untrained(cls, value: str) -> str:
        if value != "self":
            kind = "needs_weights"
            reason = (
                "the Lite selector needs its own trained weights; where a model has them, the method is flexselect_lite"
            )
            raise PydanticCustomError(kind, reason)
        return value


class FlexSelect(Reducing):
    """Run the decoder up to a reference layer on the media and the question, and keep what the question looks at most.

    The score of a token is the attention it receives in that layer from the question's rows (softmax over all keys a row
    sees), mean or maximum over rows and heads. The model then sees the top of them alone, in all its layers. This costs a
    pass over all tokens up to the reference layer, which the layers saved behind must make up for; it has no place in the
    KV cache.

    Differences from the published code: the pass sees one image or video and the question, without the system prompt
    and without other media; survivors keep their positions. Depends on the question: results are kept under keys that
    hold its tokens. Without any text, evenly spaced tokens are kept.
    """

    name: ClassVar[str] = "flexselect"
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Zhang et al., FlexSelect, NeurIPS 2025, arXiv:2506.00993 (self mode)"
    share: ClassVar[Share] = Share.QUERY
    nested: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION_ATTENTION})
    Config: ClassVar[type[FlexSelectConfig]] = FlexSelectConfig

    def plan(self, features: VisualFeatures, config: FlexSelectConfig) -> VisualPlan:
        """The k with the largest score, in raster order; nothing is merged."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        if features.asked is None:
            message = "the decoder's attention to the media was not provided"
            raise EngineError(message)
        scores = features.asked(config.depth, config.reduction)
        kept = self.kept_tokens(config, scores.shape[0])
        if not scores.any():
            return VisualPlan(middles(scores.shape[0], kept, scores.device))
        return VisualPlan(ascending(ranked(scores)[:kept]))


METHOD = FlexSelect()
