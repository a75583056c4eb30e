"""ToMe's bipartite matching, applied to the encoder's output.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv:2210.09461), section 3.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, key_metric
from prismserve.kernels.subsets import merge_alike


class ToMeConfig(KeepConfig):
    """Parameters of ToMe.

    Attributes:
        merged_per_round: pairs merged in one round, at most half of the tokens; the paper merges 7 to 16 per block.
    """

    merged_per_round: int = Field(default=8, ge=1, le=4096, strict=True)


class ToMe(Reducing):
    """Rounds of bipartite soft matching on keys, merging by size-weighted mean until the budget is met.

    In each round the tokens, in raster order, are split alternately into A and B. Every token of A proposes to the
    most similar one of B (cosine of keys, mean over heads), and the best proposals are carried out.

    The paper merges inside the encoder, between attention and MLP of every block, which makes the encoder cheaper and
    lets later blocks adapt. Here the rounds run on what comes out, with the keys of the last layer, merged as the
    tokens are; so the encoder costs what it did, and proportional attention has no place. In exchange it acts on any
    encoder whose keys are known, the number of tokens is exact, and every token still has a place in the grid: a
    merged one stands where its member of B in the last merge stood.
    """

    name: ClassVar[str] = "tome"
    section: ClassVar[str] = "IV-A.1b"
    source: ClassVar[str] = "Bolya et al., ToMe, ICLR 2023, arXiv:2210.09461 (on the encoder's output)"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ENCODER_KEYS})
    Config: ClassVar[type[ToMeConfig]] = ToMeConfig

    def plan(self, features: VisualFeatures, config: ToMeConfig) -> VisualPlan:
        """``indices`` [k] and ``weights`` [k, N], each row the mean of the tokens merged into one."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        count = features.tokens.shape[0]
        kept = self.kept_tokens(config, count)
        places, owner = merge_alike(key_metric(features), kept, config.merged_per_round)
        groups = torch.arange(kept, device=owner.device)
        members = (owner[None, :] == groups[:, None]).float()
        return VisualPlan(places, members / members.sum(1, keepdim=True))


METHOD = ToMe()
