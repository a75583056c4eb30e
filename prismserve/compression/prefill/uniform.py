"""Uniform pruning between layers: an even stride over the visual tokens, a control that looks at nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from prismserve.compression.base import Share, Stage
from prismserve.compression.cuts import Cut, CutPlan
from prismserve.compression.prefill._common import OneCutConfig, checked_layer

if TYPE_CHECKING:
    from prismserve.compression.cuts import CutInputs


class UniformPruning:
    """Survivor i of k is the token in the middle of the i-th of k equal parts (``AGN*``). Survivors keep positions."""

    name: ClassVar[str] = "uniform"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "control"
    source: ClassVar[str] = ""
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.AGNOSTIC_IN_MODEL
    nested: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    Config: ClassVar[type[OneCutConfig]] = OneCutConfig

    def cuts(self, config: OneCutConfig, layers: int) -> tuple[Cut, ...]:
        """One, which looks at nothing."""
        return (Cut(checked_layer(config.layer, layers)),)

    def kept_tokens(self, config: OneCutConfig, layers: int, tokens: int) -> tuple[int, ...]:  # noqa: ARG002
        """Exactly the budget."""
        return (min(tokens, config.kept(tokens)),)

    def plan(self, cut: int, inputs: CutInputs, config: OneCutConfig) -> CutPlan:  # noqa: ARG002 - there is one cut
        """Indices at an even stride."""
        kept = min(inputs.tokens, config.kept(inputs.tokens))
        steps = torch.arange(kept, device=inputs.places.device)
        return CutPlan((2 * steps + 1) * inputs.tokens // (2 * kept))


METHOD = UniformPruning()
