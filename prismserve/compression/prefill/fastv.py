"""FastV: behind a shallow layer, drop the visual tokens that the prompt's last token looks at least.

Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models", ECCV 2024 (arXiv:2403.06764), section 4, and its published code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from prismserve.compression.base import Share, Stage
from prismserve.compression.cuts import Cut, CutPlan, Raters, Tap
from prismserve.compression.prefill._common import OneCutConfig, checked_layer, given, top

if TYPE_CHECKING:
    from prismserve.compression.cuts import CutInputs


class FastV:
    """Keep the visual tokens with the largest attention of the last prompt token in layer K-1, mean over heads.

    ``layer`` is K (2 in the paper), ``keep`` is 1 - R (0.5). The paper filters anew at every decoding step; like the
    published code's path with a KV cache, every step sees the first selection, which is also the only one whose KV is
    small. K = 0, random choice in the code, is the method ``random``. With several images the budget is spent over all
    of them together. Survivors keep their positions, as in the code.

    The score row belongs to the question, so layers from K on are private to it (``QRY``).
    """

    name: ClassVar[str] = "fastv"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "IV-A.1a"
    source: ClassVar[str] = "Chen et al., FastV, ECCV 2024, arXiv:2403.06764"
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.QUERY
    nested: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    Config: ClassVar[type[OneCutConfig]] = OneCutConfig

    def cuts(self, config: OneCutConfig, layers: int) -> tuple[Cut, ...]:
        """One, before layer K."""
        return (Cut(checked_layer(config.layer, layers, 1), Tap.BEFORE, Raters.LAST),)

    def kept_tokens(self, config: OneCutConfig, layers: int, tokens: int) -> tuple[int, ...]:  # noqa: ARG002
        """Exactly the budget."""
        return (min(tokens, config.kept(tokens)),)

    def plan(self, cut: int, inputs: CutInputs, config: OneCutConfig) -> CutPlan:  # noqa: ARG002 - there is one cut
        """The largest means over heads of the last row."""
        scores = given(inputs.scores, "the last row's attention")[-1].mean(0)
        return CutPlan(top(scores, min(inputs.tokens, config.kept(inputs.tokens))))


METHOD = FastV()
