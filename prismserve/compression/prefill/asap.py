"""ASAP: rank visual tokens by a salience free of RoPE's bias, merge near-duplicates, refill what that frees.

Source: Pathak and Han, "ASAP: Attention-Shift-Aware Pruning for Efficient LVLM Inference", read from its text; no code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from prismserve.compression.base import Share, Stage
from prismserve.compression.cuts import Cut, CutNeed, CutPlan, Tap, salience
from prismserve.compression.prefill._common import OneCutConfig, best_first, checked_layer, fold_into, given

if TYPE_CHECKING:
    from prismserve.compression.cuts import CutInputs


class AsapConfig(OneCutConfig):
    """Budget and strengths.

    Attributes:
        blend: lambda_max, how much of its causal weight the most salient token has for rows before it; 0 leaves the
            attention causal.
        similarity: cosine of hidden states above which the less salient of two kept tokens is merged.
    """

    blend: float = Field(default=0.1, ge=0.0, le=1.0, strict=True, allow_inf_nan=False)
    similarity: float = Field(default=0.95, ge=-1.0, le=1.0, strict=True, allow_inf_nan=False)


class Asap:
    """Salience ``s_j = sum_i q_i . k_j`` over all visual rows i, which no mask and so no distance favours (R5).

    In layer K-1 a visual token also attends to later visual tokens j, their weights scaled by ``blend`` times j's
    salience, spread to 0..1 (at least 1e-6). Before layer K the most salient tokens are kept; a kept token whose
    hidden state has a cosine above ``similarity`` with a more salient one is averaged into it, weighted by salience; the
    places that frees go to the most salient of the dropped.

    The paper's layer, lambda_max and threshold were not stated in the text we had: the defaults are ours, K as FastV's.
    It leaves open whether the ranking uses the masked attention or s; we rank by s, so that the result is independent of
    the question (``AGN*``). Survivors keep their positions.
    """

    name: ClassVar[str] = "asap"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "IV-A.1b"
    source: ClassVar[str] = "Pathak and Han, ASAP"
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.AGNOSTIC_IN_MODEL
    nested: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    Config: ClassVar[type[AsapConfig]] = AsapConfig

    def cuts(self, config: AsapConfig, layers: int) -> tuple[Cut, ...]:
        """One, before layer K."""
        needs = frozenset({CutNeed.QUERY_SUMS, CutNeed.HIDDEN})
        return (Cut(checked_layer(config.layer, layers, 1), Tap.BEFORE, needs=needs, blend=config.blend),)

    def kept_tokens(self, config: AsapConfig, layers: int, tokens: int) -> tuple[int, ...]:  # noqa: ARG002
        """Exactly the budget: merged tokens are replaced."""
        return (min(tokens, config.kept(tokens)),)

    def plan(self, cut: int, inputs: CutInputs, config: AsapConfig) -> CutPlan:  # noqa: ARG002 - there is one cut
        """Keep, merge, refill."""
        kept, tokens = min(inputs.tokens, config.kept(inputs.tokens)), inputs.tokens
        strength = salience(given(inputs.query_sums, "column sums"))
        order = best_first(strength)
        if kept == tokens:
            return CutPlan(order.sort().values)
        first, rest = order[:kept], order[kept:]
        normal = functional.normalize(given(inputs.hidden, "hidden states")[first].float(), dim=1)
        owner = _owners(normal @ normal.T > config.similarity)
        merged = owner != torch.arange(kept, device=owner.device)
        # What was merged leaves a place; more may have been merged than there are others to take the places.
        spare = torch.cumsum(merged, 0) > len(rest)
        merged &= ~spare
        indices = torch.cat((first[~merged], rest[: int(merged.sum())])).sort().values
        number = torch.full((tokens,), -1, device=indices.device)
        number[indices] = torch.arange(len(indices), device=indices.device)
        joins = torch.full((tokens,), -1, device=indices.device)
        joins[first[merged]] = number[first[owner[merged]]]
        targets, weights = fold_into(tokens, indices, joins, strength.clamp_min(1e-6))
        return CutPlan(indices, targets, weights)


def _owners(close: torch.Tensor) -> torch.Tensor:
    """[k] for tokens by falling salience: the first earlier token that is ``close`` and itself unmerged, or itself."""
    near = close.tolist()
    owner = list(range(len(near)))
    leaders: list[int] = []
    for token, row in enumerate(near):
        leader = next((earlier for earlier in leaders if row[earlier]), token)
        owner[token] = leader
        if leader == token:
            leaders.append(token)
    return torch.tensor(owner, dtype=torch.int64, device=close.device)


METHOD = Asap()
