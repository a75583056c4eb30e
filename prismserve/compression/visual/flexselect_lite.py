"""FlexSelect Lite: a small decoder that was trained to rank visual tokens for a question.

Source: Zhang et al., "FlexSelect: Flexible Token Selection for Efficient Long Video Understanding", NeurIPS 2025
(arXiv:2506.00993), section 3.2, and its published code.
"""

from __future__ import annotations

from typing import ClassVar

from prismserve.compression.base import KeepConfig, Need, Reduction, Share, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, ascending, ranked
from prismserve.compression.visual._video import middles
from prismserve.core.errors import EngineError


class FlexSelectLiteConfig(KeepConfig):
    """Parameters of FlexSelect Lite.

    Attributes:
        reduction: how the rows of the question and the heads are taken together; the selectors were trained for ``max``.
    """

    reduction: Reduction = "max"


class FlexSelectLite(Reducing):
    """Keep what the last layer of the selector looks at most from the question's rows.

    The selector is a Qwen2 decoder with a projector of its own over the patches of the vision tower, loaded from the folder
    ``token_selector`` of the model's directory (:mod:`prismserve.models.token_selector`); without it the method is refused.
    It sees one image or video and the question, without the system prompt; survivors keep their positions. Depends on the
    question: results are kept under keys that hold its tokens. Without any text, evenly spaced tokens are kept.
    """

    name: ClassVar[str] = "flexselect_lite"
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Zhang et al., FlexSelect, NeurIPS 2025, arXiv:2506.00993 (Lite)"
    training_free: ClassVar[bool] = False
    share: ClassVar[Share] = Share.QUERY
    nested: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SELECTOR})
    Config: ClassVar[type[FlexSelectLiteConfig]] = FlexSelectLiteConfig

    def plan(self, features: VisualFeatures, config: FlexSelectLiteConfig) -> VisualPlan:
        """The k with the largest score, in raster order; nothing is merged."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        if features.selected is None:
            message = "the selector's attention to the media was not provided"
            raise EngineError(message)
        scores = features.selected(1.0, config.reduction)
        kept = self.kept_tokens(config, scores.shape[0])
        if not scores.any():
            return VisualPlan(middles(scores.shape[0], kept, scores.device))
        return VisualPlan(ascending(ranked(scores)[:kept]))


METHOD = FlexSelectLite()
