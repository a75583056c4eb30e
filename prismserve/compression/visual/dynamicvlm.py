"""Dynamic-VLM's rule of tokens per frame: pool every frame to what its share of a total budget allows.

Source: Wang et al., "Dynamic-VLM: Simple Dynamic Visual Token Compression for VideoLLM" (ByteVideoLLM), ICCV 2025
(arXiv:2412.09530), section 3.2, and its published code.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from prismserve.compression.base import KeepConfig, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing
from prismserve.compression.visual._video import evenly_pooled


class DynamicVLMConfig(KeepConfig):
    """Parameters of Dynamic-VLM.

    Attributes:
        keep: the budget of the whole video, 2048 tokens in the paper.
    """

    keep: int | float = Field(default=2048, gt=0)


class DynamicVLM(Reducing):
    """Mean pooling of each frame's grid to an equal share of the budget.

    How many tokens a frame has depends on how many frames there are, and on nothing it shows. The published code pools
    to squares, of floor(sqrt(n))^2 tokens, at most 12 x 12, because that is what its model was trained on; here a frame
    becomes exactly its share of cells, as square as they come, so that the budget is used up (a share that is a square
    gives its square, on a square grid). A share of no tokens leaves a frame out. Cells are those of adaptive average
    pooling: where a side does not divide, neighbours share a row or a column. A cell's mean stands at the patch nearest
    to its middle. The model that was trained for this is not imitated; any model that takes pooled features can use it.

    An image is one frame.
    """

    name: ClassVar[str] = "dynamicvlm"
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Wang et al., Dynamic-VLM, ICCV 2025, arXiv:2412.09530 (pooling rule alone)"
    Config: ClassVar[type[DynamicVLMConfig]] = DynamicVLMConfig

    def plan(self, features: VisualFeatures, config: DynamicVLMConfig) -> VisualPlan:
        """``indices`` [k] and ``weights`` [k, N], each row the mean of its cell."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        return evenly_pooled(features, self.kept_tokens(config, features.tokens.shape[0]))


METHOD = DynamicVLM()
