"""DyCoke: of four frames in a row drop from three what they repeat, and decode by the visual tokens in use.

Source: Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025
(arXiv:2411.15024), section 3.2 and 3.3, and its published code.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan
from prismserve.compression.focus import Glance
from prismserve.compression.visual._shared import Reducing, ascending, projected, ranked
from prismserve.compression.visual._video import cosine, even_shares, framed, middles
from prismserve.core.errors import InvalidRequestError

_GROUP = 4


class DycokeConfig(KeepConfig):
    """Parameters of DyCoke.

    Attributes:
        keep: the budget of the first stage; (1 + 3 (1 - K)) / 4 keeps what the paper's K keeps, which is 0.7.
        decode: the second stage: share of the visual tokens that are left which a step of decoding reads, the paper's
            1 - P, where P is 0.7; 1 reads them all, and leaves the second stage out.
        decode_layer: first layer that reads the choice, the paper's L; the one before it is looked at.
        settled: cosine of two steps' attention from which on nothing is chosen anew.
        unchanged: what is read then: ``last``, what was read before, as the paper says; ``all``, as its code does.
    """

    keep: int | float = Field(default=0.475, gt=0)
    decode: float = Field(default=1.0, gt=0.0, le=1.0, strict=True, allow_inf_nan=False)
    decode_layer: int = Field(default=3, ge=1, le=1024, strict=True)
    settled: float = Field(default=0.9, ge=-1.0, le=2.0, strict=True, allow_inf_nan=False)
    unchanged: Literal["last", "all"] = "last"


class Dycoke(Reducing):
    """First keep the first of every four frames; of the others, the tokens least like the ones they are compared with.

    In each group of four the second frame is compared with the first, the fourth with the third, and the third with the
    first, place by place (cosine of decoder inputs). The budget beyond the first frames is spread evenly over the others,
    which is the paper's share 1 - K of each. Nothing is merged: the published code drops too, although the paper speaks
    of merging.

    Differences from the published code: survivors keep their order and positions (there they come by falling
    dissimilarity), and the last group of four is no exception to the comparison of its third frame. A budget that does
    not hold the first frames of all groups treats these as a video of their own, again and again; what is left at last
    is one frame, of which evenly spaced tokens are kept. So it is with an image.

    Then, at each step of decoding, the newest token's attention in layer ``decode_layer - 1`` (mean over heads) ranks the
    visual tokens of the prompt, all images and videos together, and the layers behind read the top share of them beside
    all text. Nothing is deleted, so a token that was left out comes back when it matters. If the attention is as it was
    in the step before, so is the choice.
    """

    name: ClassVar[str] = "dycoke"
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Tao et al., DyCoke, CVPR 2025, arXiv:2411.15024"
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

    def focus_layer(self, config: DycokeConfig, layers: int) -> int | None:
        """``decode_layer``, where a share is left out."""
        if config.decode == 1.0:
            return None
        if config.decode_layer >= layers:
            field = "compression.visual.decode_layer"
            message = f"{field}: this model has layers 0 to {layers - 1}, and {config.decode_layer} is not among them"
            raise InvalidRequestError(message, field=field)
        return config.decode_layer

    def glance(self, scores: torch.Tensor, before: Glance | None, config: DycokeConfig) -> Glance:
        """The top share, in raster order; what was read before where the scores are as before."""
        if before is not None and float(cosine(scores, before.scores)) >= config.settled:
            return Glance(scores, before.read if config.unchanged == "last" else None)
        read = max(1, round(config.decode * scores.shape[0]))
        return Glance(scores, ascending(ranked(scores)[:read]))


METHOD = Dycoke()
