"""Keep every visual token in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from prismserve.compression.base import Share, Stage
from prismserve.compression.cuts import CutPlan
from prismserve.core.config import FrozenConfig

if TYPE_CHECKING:
    from prismserve.compression.cuts import Cut, CutInputs


class NoParameters(FrozenConfig):
    """There is nothing to set."""


class NoPruning:
    """No cut at all: requests are served, and cached, as if there were no such stage."""

    name: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "control"
    source: ClassVar[str] = ""
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.AGNOSTIC_IN_MODEL
    nested: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    Config: ClassVar[type[FrozenConfig]] = NoParameters

    def cuts(self, config: FrozenConfig, layers: int) -> tuple[Cut, ...]:  # noqa: ARG002
        """None."""
        return ()

    def kept_tokens(self, config: FrozenConfig, layers: int, tokens: int) -> tuple[int, ...]:  # noqa: ARG002
        """There is no cut."""
        return ()

    def plan(self, cut: int, inputs: CutInputs, config: FrozenConfig) -> CutPlan:  # noqa: ARG002
        """Every token."""
        return CutPlan(torch.arange(inputs.tokens, device=inputs.places.device))


METHOD = NoPruning()
