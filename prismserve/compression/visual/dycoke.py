"""DyCoke's first stage: of four frames in a row, drop from three what they repeat.

Source: Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025
(arXiv:2411.15024), section 3.2, and its published code.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, ascending, projected, ranked
from prismserve.compression.visual._video import cosine, even_shares, framed, middles

_GROUP = 4


class DycokeConfig(KeepConfig):
    """Parameters of DyCoke's first stage.

    Attributes:
        keep: the budget; (1 + 3 (1 - K)) / 4 keeps what the paper's K keeps, which is 0.7.
    """

    keep: int | float = Field(default=0.475, gt=0)


class Dycoke(Reducing):
    """Keep the first of every four frames; of the others, the tokens least like the ones they are compared with.

    In each group of four the second frame is compared with the first, the fourth with the third, and the third with the
    first, place by place (cosine of decoder inputs). The budget beyond the first frames is spread evenly over the others,
    which is the paper's share 1 - K of each. Nothing is merged: the published code drops too, although the paper speaks
    of merging.

    Differences from the published code: survivors keep their order and positions (there they come by falling
    dissimilarity), and the last group of four is no exception to the comparison of its third frame. A budget that does
    not hold the first frames of all groups treats these as a video of their own, again and again; what is left at last
    is one frame, of which evenly spaced tokens are kept. So it is with an image.

    The second stage (which image tokens a step of decoding attends to) is not part of this method.
    """

    name: ClassVar[str] = "dycoke"
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Tao et al., DyCoke, CVPR 2025, arXiv:2411.15024 (first stage)"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROJECTED})
    Config: ClassVar[type[DycokeConfig]] = DycokeConfig

    def plan(self, features: VisualFeatures, config: DycokeConfig) -> VisualPlan:
        """The k least repeated, in raster order."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        frames = framed(projected(features), features)
        patches, kept = frames.shape[1], self.kept_tokens(config, features.tokens.shape[0])
        device = frames.device
        numbers = torch.arange(frames.shape[0], device=device)
        while len(numbers) > 1 and kept < len(numbers[::_GROUP]) * patches:
            numbers = numbers[::_GROUP]
        if len(numbers) == 1:
            return VisualPlan(numbers[0] * patches + middles(patches, kept, device))
        first, others = numbers[::_GROUP], [place for place in range(len(numbers)) if place % _GROUP]
        shares = even_shares(kept - len(first) * patches, [patches] * len(others))
        chosen = [(first[:, None] * patches + torch.arange(patches, device=device)).flatten()]
        for place, share in zip(others, shares, strict=True):
            # Of a group 0 1 2 3: 1 with 0, 2 with 0, 3 with 2.
            earlier = place - (1 if place % 2 else 2)
            unlike = ranked(-cosine(frames[numbers[place]], frames[numbers[earlier]]))
            chosen.append(numbers[place] * patches + unlike[:share])
        return VisualPlan(ascending(torch.cat(chosen)))


METHOD = Dycoke()
