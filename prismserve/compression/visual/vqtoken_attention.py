"""VQToken whole: K-means codes, the map of where they lie, and the trained attention that makes tokens of both.

Source: Zhang and Fu, "VQToken: Neural Discrete Token Representation Learning for Extreme Token Reduction in Video Large
Language Models", NeurIPS 2025 (arXiv:2503.16980), section 3, and its published code.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan, Written
from prismserve.compression.visual._shared import Reducing
from prismserve.compression.visual._video import middles
from prismserve.compression.visual.vqtoken import clusters
from prismserve.core.errors import EngineError, InvalidRequestError


class VQTokenAttentionConfig(KeepConfig):
    """Parameters of VQToken.

    Attributes:
        keep: codes, and so tokens; at least the number of frames. The released weights were trained for 32.
        rounds: most rounds of K-means.
    """

    keep: int | float = Field(default=32, gt=0)
    rounds: int = Field(default=50, ge=1, le=1024, strict=True)


class VQTokenAttention(Reducing):
    """The decoder reads what a trained attention of the map makes of the codes, and no patch.

    The attention is loaded from the folder ``vqtoken`` of the model's directory (:mod:`prismserve.models.code_attention`);
    without it the method is refused. All patches of the video, before the model pools them, are clustered at length 1; a
    code is the mean of its members at that length, codes are numbered by their first member, and a row of the map holds the
    numbers of one frame. Rows are taken in turn until there are as many as codes.

    K-means starts from evenly spaced patches, and not at random as in the code: equal media give equal tokens. The tokens
    take the last places of the video, next to each other and to the text, as the model was trained to read them; they do
    not depend on the question.

    ``weights`` says which patches each token's row of the map is about: those of its frame.
    """

    name: ClassVar[str] = "vqtoken_attention"
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Zhang and Fu, VQToken, NeurIPS 2025, arXiv:2503.16980 (with its trained attention)"
    training_free: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset({Need.UNPOOLED, Need.CODE_ATTENTION})
    Config: ClassVar[type[VQTokenAttentionConfig]] = VQTokenAttentionConfig

    def plan(self, features: VisualFeatures, config: VQTokenAttentionConfig) -> VisualPlan:
        """``indices`` [k] at the end, all of them ``written``.

        Raises:
            InvalidRequestError: the video has more frames than there are to be codes.
        """
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        if features.unpooled is None or features.coded is None:
            message = "the frames before pooling, or the attention over codes, were not provided"
            raise EngineError(message)
        count = features.tokens.shape[0]
        kept, frames = self.kept_tokens(config, count), features.unpooled.shape[0]
        if frames > kept:
            message = f"compression.visual.keep: {kept} codes are fewer than the {frames} frames of the video"
            raise InvalidRequestError(message, field="compression.visual.keep")
        unit = functional.normalize(features.unpooled.flatten(0, 1).float(), dim=-1)
        owner = _numbered(clusters(unit, middles(unit.shape[0], kept, unit.device), config.rounds)[1], kept)
        # A product, because adding up by index has no fixed order on a GPU.
        inside = torch.zeros(kept, unit.shape[0], device=unit.device)
        inside[owner, torch.arange(unit.shape[0], device=unit.device)] = 1.0
        codes = (inside @ unit) / inside.sum(1, keepdim=True)
        rows = torch.arange(kept, device=unit.device)
        written = Written(rows, features.coded(owner.view(frames, -1), codes))
        frame = torch.arange(count, device=unit.device) // (count // frames)
        weights = (frame == (rows % frames)[:, None]).float() / (count // frames)
        return VisualPlan(rows + (count - kept), weights, written=written)


def _numbered(owner: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers of ``count`` clusters [N] int64, given anew in the order of their first members."""
    index = torch.arange(owner.shape[0], device=owner.device)
    first = torch.full((count,), owner.shape[0], device=owner.device).scatter_reduce(0, owner, index, "amin")
    number = torch.empty_like(first)
    number[first.argsort()] = torch.arange(count, device=owner.device)
    return number[owner]


METHOD = VQTokenAttention()
