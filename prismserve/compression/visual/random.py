"""Random pruning: the control every method must beat at the same budget."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from prismserve.compression.base import KeepConfig, Need, Share, Stage, VisualFeatures, VisualPlan


class RandomPruning:
    """Keep patches drawn without replacement, seeded by the image.

    The draw ranks patches by the raw output of the Philox counter generator keyed by ``features.seed``, which is the
    same on every platform and in every version of numpy; a smaller budget keeps a subset of a larger one.
    """

    name: ClassVar[str] = "random"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.VISUAL
    section: ClassVar[str] = "control"
    source: ClassVar[str] = ""
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.AGNOSTIC
    nested: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()
    Config: ClassVar[type[KeepConfig]] = KeepConfig

    def kept_tokens(self, config: KeepConfig, tokens: int) -> int:
        """Exactly ``config.kept(tokens)``."""
        return config.kept(tokens)

    def plan(self, features: VisualFeatures, config: KeepConfig) -> VisualPlan:
        """Draw ``kept_tokens`` indices; nothing is merged."""
        count = features.tokens.shape[0]
        generator = np.random.Philox(key=int.from_bytes(features.seed[:8], "little"))
        rank = np.argsort(generator.random_raw(count), kind="stable")
        chosen = rank[: self.kept_tokens(config, count)].astype(np.int64)
        return VisualPlan.in_order(torch.from_numpy(chosen).to(features.tokens.device))


METHOD = RandomPruning()
