"""LLaMA-VID whole: for every frame a token of what the question finds in it, and tokens of all it shows.

Source: Li et al., "LLaMA-VID: An Image is Worth 2 Tokens in Large Language Models", ECCV 2024 (arXiv:2311.17043),
section 3, and its published code.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig, Need, Share, VisualFeatures, VisualPlan, Written
from prismserve.compression.visual._shared import Reducing
from prismserve.compression.visual._video import even_shares, framed, pooled_frames
from prismserve.core.errors import EngineError


class LlamaVIDContextConfig(KeepConfig):
    """Parameters of LLaMA-VID.

    Attributes:
        keep: tokens of the whole medium. Two a frame are the paper's ``mean``, 1 + g x g a frame its ``grid:g``.
    """

    keep: int | float = Field(default=2, gt=0)


class LlamaVIDContext(Reducing):
    """A frame's context token, then its content tokens, as the model was trained to read them.

    The branch that looks at the frames for the question is loaded from the folder ``llamavid`` of the model's directory
    (:mod:`prismserve.models.context_branch`); without it the method is refused. A frame has an equal share of the budget:
    one token is the context token, more are the means of as many cells less one (see ``llamavid``), which go through the
    model's own projector. A share of none leaves a frame out.

    The tokens take the last places of the medium, next to each other and to the text. ``weights`` of a context token say
    how much each patch counts in it. Depends on the question: results are kept under keys that hold its tokens.
    """

    name: ClassVar[str] = "llamavid_context"
    section: ClassVar[str] = "IV-A.2a"
    source: ClassVar[str] = "Li et al., LLaMA-VID, ECCV 2024, arXiv:2311.17043 (with its context token)"
    training_free: ClassVar[bool] = False
    share: ClassVar[Share] = Share.QUERY
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLASS_TOKEN, Need.CONTEXT})
    Config: ClassVar[type[LlamaVIDContextConfig]] = LlamaVIDContextConfig

    def plan(self, features: VisualFeatures, config: LlamaVIDContextConfig) -> VisualPlan:
        """``indices`` [k] at the end, with ``weights`` [k, N]; context tokens are ``written``."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        if features.guided is None or features.class_token is None:
            message = "the text-guided branch or the class token was not provided"
            raise EngineError(message)
        count, device = features.tokens.shape[0], features.tokens.device
        kept, patches = self.kept_tokens(config, count), count // features.frames
        shares = even_shares(kept, [patches] * features.frames)
        looked, embeds = features.guided(framed(features.tokens, features), features.class_token.float())
        shown = torch.tensor([frame for frame, share in enumerate(shares) if share], device=device)
        context = torch.zeros(len(shown), features.frames, patches, device=device)
        context[torch.arange(len(shown), device=device), shown] = looked[shown]
        content = pooled_frames(features, [max(0, share - 1) for share in shares])
        weights = [context.flatten(1), *([] if content.weights is None else [content.weights])]
        # By frame, and in it the context token first.
        order = torch.cat((2 * shown, 2 * (content.indices // patches) + 1)).argsort(stable=True)
        written = Written((order < len(shown)).nonzero()[:, 0], embeds[shown])
        places = torch.arange(count - kept, count, device=device)
        return VisualPlan(places, torch.cat(weights)[order], written=written)


METHOD = LlamaVIDContext()
