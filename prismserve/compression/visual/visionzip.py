"""VisionZip: keep the patches the class token looks at, fold the others into a few context tokens.

Source: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025
(arXiv:2412.04467), and its published code.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig, Need, Share, Stage, VisualFeatures, VisualPlan
from prismserve.core.errors import EngineError
from prismserve.kernels.subsets import closest


class VisionZipConfig(KeepConfig):
    """Parameters of VisionZip.

    Attributes:
        contextual: share of the kept tokens that are context tokens; the paper keeps 10 of 64.
        merge: how a context token takes in the tokens assigned to it. ``sum`` adds their mean to the target, as the
            published code does (the norm roughly doubles); ``mean`` is half of that, so the norm stays in range;
            ``none`` keeps the target alone. On the bundled model the three are within 0.2 points of each other
            (mean accuracy over ten families, 240 scenes, at 49 and at 24 of 196 tokens), so the default is the one
            that leaves the projector's input in the range it was trained on.
    """

    contextual: float = Field(default=10 / 64, ge=0.0, le=1.0, strict=True, allow_inf_nan=False)
    merge: Literal["sum", "mean", "none"] = "mean"


class VisionZip:
    """Dominant tokens by class-token attention, context tokens by merging the rest on key similarity.

    Dominant tokens have the largest attention of the class token, summed over heads. Of the rest, in raster order,
    every ``rest // contextual``-th is a target; every other one is assigned to the target with the most similar key
    (cosine of the mean over heads) and merged into it.

    Differences from the published code, which writes the survivors one after another with new positions: survivors
    keep their raster order and their original positions, a context token that of its target; and the class token is
    not kept as a token, because it has no place in the patch grid and so no position to keep, and because models
    that read patches only never saw it in training. The whole budget goes to patches.

    Encoders without a class token provide the mean attention a patch receives as ``cls_attention``.
    Depends on the image alone. Scores are float32, ties go to the lower index.
    """

    name: ClassVar[str] = "visionzip"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.VISUAL
    section: ClassVar[str] = "IV-A.1a, IV-A.1b"
    source: ClassVar[str] = "Yang et al., VisionZip, CVPR 2025, arXiv:2412.04467"
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.AGNOSTIC
    nested: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLS_ATTENTION, Need.ENCODER_KEYS})
    Config: ClassVar[type[VisionZipConfig]] = VisionZipConfig

    def kept_tokens(self, config: VisionZipConfig, tokens: int) -> int:
        """Dominant and context tokens together: exactly ``config.kept(tokens)``."""
        return config.kept(tokens)

    def plan(self, features: VisualFeatures, config: VisionZipConfig) -> VisualPlan:
        """Choose survivors and merge weights.

        Args:
            features: tokens [N, C] with ``cls_attention`` [H, N] and ``keys`` [N, H, d].
            config: budget, share of context tokens, merge rule.

        Returns:
            ``indices`` [k] int64; ``weights`` [k, N] float32, None where nothing is merged.

        Raises:
            EngineError: the encoder's attention or keys were not provided.
        """
        if features.cls_attention is None or features.keys is None:
            message = "visionzip needs the encoder's cls_attention and keys, and the model runner provided none"
            raise EngineError(message)
        count = features.tokens.shape[0]
        device = features.tokens.device
        kept = self.kept_tokens(config, count)
        if kept == count:
            return VisualPlan(torch.arange(count, device=device))
        contextual = round(config.contextual * kept)
        score = features.cls_attention.float().sum(0)
        order = torch.sort(score, descending=True, stable=True).indices
        dominant = order[: kept - contextual]
        rest = order[kept - contextual :].sort().values
        even = (
            slice(0, rest.shape[0] // contextual * contextual, rest.shape[0] // contextual) if contextual else slice(0)
        )
        targets = rest[even]
        indices = torch.cat([dominant, targets]).sort().values
        if contextual == 0 or config.merge == "none":
            return VisualPlan(indices)
        owner = closest(features.keys.float().mean(1), rest, targets)
        owner[even] = torch.arange(contextual, device=device)
        members = torch.bincount(owner, minlength=contextual) - 1
        share = (0.5 if config.merge == "mean" else 1.0) / members.clamp(min=1)
        rows = torch.searchsorted(indices, targets.contiguous())
        weights = torch.zeros(kept, count, device=device).scatter_(1, indices[:, None], 1.0)
        weights[rows[owner], rest] = share[owner]
        weights[rows, targets] = torch.where(members > 0, 0.5, 1.0) if config.merge == "mean" else 1.0
        return VisualPlan(indices, weights)


METHOD = VisionZip()
