"""TRIM: keep the patches that CLIP's text tower finds in the question, and one mean of the others.

Source: Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs", COLING
2025 (arXiv:2409.10994), section 3, and its published code.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from prismserve.compression.base import KeepConfig, Need, Share, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, ascending, ranked
from prismserve.compression.visual._video import Merging, middles
from prismserve.core.errors import EngineError


class Trim(Reducing):
    """Rank patches by CLIP's similarity to the question; the last token of the budget is the mean of what is left.

    Patches and question are taken into the space that CLIP's two towers share; the score of patch z is -z t, mean over
    the segments t of the question (the published code has one, of at most 77 tokens). The minus sign is the code's: there
    patches are the less like the text, the more they show of it. It compares raw products where the paper writes cosines,
    and so does this.

    The published code can also choose the number of tokens (the share of scores above the third quartile plus 1.5 times
    the spread between quartiles); here the budget is given. The mean of what is left stands in the place of the last
    token left out, where the code appends it; survivors keep their positions. A budget of one token is the best patch
    alone. Without any text, evenly spaced tokens are kept.

    Needs a text tower: a CLIP checkpoint in the folder ``text_tower`` of the model's own, with the same vision tower.
    """

    name: ClassVar[str] = "trim"
    section: ClassVar[str] = "IV-A.1a"
    source: ClassVar[str] = "Song et al., TRIM, COLING 2025, arXiv:2409.10994"
    share: ClassVar[Share] = Share.QUERY
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TEXT_TOWER})
    Config: ClassVar[type[KeepConfig]] = KeepConfig

    def plan(self, features: VisualFeatures, config: KeepConfig) -> VisualPlan:
        """``indices`` [k] and ``weights`` [k, N], each row of sum 1."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        if features.aligned is None or features.aligned_text is None:
            message = "patches and text in the shared space were not provided"
            raise EngineError(message)
        count = features.aligned.shape[0]
        kept, device = self.kept_tokens(config, count), features.aligned.device
        if features.aligned_text.shape[0] == 0:
            return VisualPlan(middles(count, kept, device))
        order = ranked(-(features.aligned.float() @ features.aligned_text.float().T).mean(1))
        if kept == 1:
            return VisualPlan(order[:1])
        rest = ascending(order[kept - 1 :])
        merging = Merging(count, device)
        merging.keep(order[: kept - 1])
        place = rest[-1:]
        merging.fold(place, place.expand(len(rest)), rest, torch.full((len(rest),), 1.0 / len(rest), device=device))
        return merging.plan()


METHOD = Trim()
