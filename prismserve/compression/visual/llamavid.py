"""LLaMA-VID's content tokens: pool every frame to very few tokens.

Source: Li et al., "LLaMA-VID: An Image is Worth 2 Tokens in Large Language Models", ECCV 2024 (arXiv:2311.17043),
section 3.2, and its published code.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from prismserve.compression.base import KeepConfig, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing
from prismserve.compression.visual._video import evenly_pooled


class LlamaVIDConfig(KeepConfig):
    """Parameters of LLaMA-VID.

    Attributes:
        keep: content tokens of the whole video; the number of its frames keeps one of each, as the paper does.
        context: the text-guided context token of each frame. It comes out of a text encoder and projectors that were
            trained with LLaMA-VID's own models and is ``llamavid_context``, so ``True`` is refused here.
    """

    keep: int | float = Field(default=0.25, gt=0)
    context: bool = Field(default=False, strict=True)

    @field_validator("context")
    @classmethod
    def _untrained(cls, value: bool) -> bool:  # noqa: FBT001 - pydantic calls it
        if value:
            kind = "needs_weights"
            reason = "the context token needs LLaMA-VID's own trained weights; it is the method llamavid_context"
            raise PydanticCustomError(kind, reason)
        return value


class LlamaVID(Reducing):
    """Content tokens alone: the mean of each frame, or of the cells of a grid over it.

    A frame has an equal share of the budget. One token is the mean of the frame; more are the means of as many cells, as
    square as they come (the paper's g x g average pooling where that is the share). A share of none leaves a frame out.
    A cell's mean stands at the patch nearest to its middle. This needs no training, and is not the trained system: that
    has the context token beside them (``llamavid_context``), and a decoder that was trained to read two tokens per frame.

    An image is one frame.
    """

    name: ClassVar[str] = "llamavid"
    section: ClassVar[str] = "IV-A.2a"
    source: ClassVar[str] = "Li et al., LLaMA-VID, ECCV 2024, arXiv:2311.17043 (content tokens alone)"
    Config: ClassVar[type[LlamaVIDConfig]] = LlamaVIDConfig

    def plan(self, features: VisualFeatures, config: LlamaVIDConfig) -> VisualPlan:
        """``indices`` [k] and ``weights`` [k, N], each row the mean of its cell."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        return evenly_pooled(features, self.kept_tokens(config, features.tokens.shape[0]))


METHOD = LlamaVID()
