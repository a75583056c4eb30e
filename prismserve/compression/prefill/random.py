"""Random pruning between layers: the control a prefill method must beat at the same budget and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from prismserve.compression.base import Share, Stage
from prismserve.compression.cuts import Cut, CutPlan
from prismserve.compression.prefill._common import OneCutConfig, checked_layer

if TYPE_CHECKING:
    from prismserve.compression.cuts import CutInputs


class RandomPruning:
    """Keep tokens drawn without replacement, seeded by the pixels (``AGN*``); FastV's published code with K = 0.

    The draw ranks tokens by the raw output of the Philox counter generator keyed by ``inputs.seed``, so that a smaller
    budget keeps a subset. Survivors keep their positions.
    """

    name: ClassVar[str] = "random"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "control"
    source: ClassVar[str] = ""
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.AGNOSTIC_IN_MODEL
    nested: ClassVar[bool] = True
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
        """Draw."""
        generator = np.random.Philox(key=int.from_bytes(inputs.seed[:8], "little"))
        rank = np.argsort(generator.random_raw(inputs.tokens), kind="stable")
        chosen = np.sort(rank[: min(inputs.tokens, config.kept(inputs.tokens))]).astype(np.int64)
        return CutPlan(torch.from_numpy(chosen).to(inputs.places.device))


METHOD = RandomPruning()
