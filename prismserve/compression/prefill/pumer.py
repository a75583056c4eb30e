"""PuMer for images alone: prune by the question's attention, then merge the rest pairwise, at three layers.

Source: Cao et al., "PuMer: Pruning and Merging Tokens for Efficient Vision Language Models", ACL 2023 (arXiv:2305.17530),
and its published code for ViLT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import torch
from pydantic import Field
from torch.nn import functional

from prismserve.compression.base import KeepConfig, Share, Stage
from prismserve.compression.cuts import Cut, CutNeed, CutPlan, Raters, Tap
from prismserve.compression.prefill._common import best_first, fold_into, geometric, given, layers_at, top

if TYPE_CHECKING:
    from prismserve.compression.cuts import CutInputs

_LAYERS: Final = (2 / 12, 5 / 12, 8 / 12)
_PRUNED: Final = 0.1 / (0.1 + 0.9 * 0.3)


class PumerConfig(KeepConfig):
    """Budget: ``keep`` is what is left behind the last of three cuts; a quarter is what the paper's rates come to."""

    keep: int | float = Field(default=0.25, gt=0)


class Pumer:
    """At each cut drop the tokens the question looks at least, then merge the most alike of the others in pairs.

    Attention is the mean over heads and over the text behind the last image in layer c-1. Merging is ToMe's: survivors
    are split alternately into A and B, each of A finds the most similar of B (cosine of keys, mean over heads), the best
    edges merge, averages weighted by how many tokens each side stands for. Of what a cut removes, 27 % are dropped and
    the others merged, the proportion of the paper's rates 0.1 and 0.3; cuts lie at 2, 5 and 8 of 12 layers.

    This is the *image-only* half: the original also merges text tokens and fine-tunes the model with distillation. A
    causal model answers from its text tokens, so they stay, and nothing is trained. Survivors keep positions. ``QRY``.
    """

    name: ClassVar[str] = "pumer"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "IV-A.1b"
    source: ClassVar[str] = "Cao et al., PuMer, ACL 2023, arXiv:2305.17530 (images only)"
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.QUERY
    nested: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    Config: ClassVar[type[PumerConfig]] = PumerConfig

    def cuts(self, config: PumerConfig, layers: int) -> tuple[Cut, ...]:  # noqa: ARG002 - the places are fixed
        """Three, at the paper's shares of the depth."""
        needs = frozenset({CutNeed.KEYS})
        return tuple(Cut(layer, Tap.BEFORE, Raters.QUESTION, needs) for layer in layers_at(_LAYERS, layers))

    def kept_tokens(self, config: PumerConfig, layers: int, tokens: int) -> tuple[int, ...]:  # noqa: ARG002
        """A geometric row that ends with the budget."""
        return geometric(tokens, min(tokens, config.kept(tokens)), (1 / 3, 2 / 3, 1.0))

    def plan(self, cut: int, inputs: CutInputs, config: PumerConfig) -> CutPlan:
        """Prune, then merge."""
        kept, tokens = self.kept_tokens(config, inputs.layers, inputs.history[0])[cut], inputs.tokens
        ratings = given(inputs.scores, "the question's attention").mean((0, 1))
        # Merging in pairs can take away half of what is there at most; what is above that is dropped too.
        stay = min(tokens - round(_PRUNED * (tokens - kept)), 2 * kept)
        stay = max(stay, kept)
        alive = top(ratings, stay)
        merges = stay - kept
        if merges == 0:
            return CutPlan(alive)
        metric = functional.normalize(given(inputs.keys, "keys")[alive].float().mean(1), dim=1)
        best, partner = (metric[0::2] @ metric[1::2].T).max(1)
        joining = best_first(best)[:merges]
        absorbed = torch.zeros(stay, dtype=torch.bool, device=alive.device)
        absorbed[2 * joining] = True
        indices = alive[~absorbed]
        number = torch.full((tokens,), -1, device=alive.device)
        number[indices] = torch.arange(len(indices), device=alive.device)
        joins = torch.full((tokens,), -1, device=alive.device)
        joins[alive[2 * joining]] = number[alive[2 * partner[joining] + 1]]
        return CutPlan(indices, *fold_into(tokens, indices, joins, inputs.sizes))


METHOD = Pumer()
