"""What several prefill methods share: budgets, layers by share of the depth, choosing the best, folding the rest in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig
from prismserve.core.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence


class OneCutConfig(KeepConfig):
    """Budget and place of a method that cuts once.

    Attributes:
        keep: visual tokens that go on, a count or a share of those that enter the decoder.
        layer: decoder layer before which the others leave.
    """

    keep: int | float = Field(default=0.5, gt=0)
    layer: int = Field(default=2, ge=0, le=1023, strict=True)


def checked_layer(layer: int, layers: int, first: int = 0) -> int:
    """``layer``, if the decoder has it and the method can cut there; InvalidRequestError names the field."""
    if not first <= layer < layers:
        field = "compression.prefill.layer"
        message = f"{field} must be between {first} and {layers - 1} for a decoder of {layers} layers, not {layer}"
        raise InvalidRequestError(message, field=field)
    return layer


def layers_at(shares: Sequence[float], layers: int, first: int = 1) -> tuple[int, ...]:
    """Strictly ascending layers nearest to shares of the depth, none below ``first``.

    Raises:
        InvalidRequestError: the decoder has too few layers for so many cuts.
    """
    chosen: list[int] = []
    for share in shares:
        chosen.append(max(round(share * layers), chosen[-1] + 1 if chosen else first))
    if chosen and chosen[-1] >= layers:
        message = f"a decoder of {layers} layers has no room for {len(chosen)} cuts"
        raise InvalidRequestError(message, field="compression.prefill")
    return tuple(chosen)


def geometric(tokens: int, last: int, exponents: Sequence[float]) -> tuple[int, ...]:
    """Counts that fall from ``tokens`` to ``last``, the one at exponent e being ``tokens * (last / tokens) ** e``.

    Args:
        tokens: what there is to begin with.
        last: what is left at exponent 1, at most ``tokens``.
        exponents: ascending, the last one 1.
    """
    if tokens == 0:
        return (0,) * len(exponents)
    counts = [max(last, round(tokens * (last / tokens) ** exponent)) for exponent in exponents[:-1]]
    return (*counts, last)


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """[count] int64 indices of the largest scores [N], ascending; of equals the lower index is taken."""
    return best_first(scores)[:count].sort().values


def best_first(scores: torch.Tensor) -> torch.Tensor:
    """[N] int64: indices by falling score, equals in order."""
    return scores.float().argsort(descending=True, stable=True)


def fold_into(
    tokens: int, indices: torch.Tensor, targets: torch.Tensor, mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets and weights of a plan whose survivors become averages.

    Args:
        tokens: N.
        indices: [k] survivors.
        targets: [N] int64, which survivor (by number) a token joins, -1 if none; survivors join themselves.
        mass: [N] float32, what a token counts in the average.

    Returns:
        Targets [N] and weights [N] float32 that sum to 1 over what joins a survivor.
    """
    targets = targets.clone()
    targets[indices] = torch.arange(indices.shape[0], device=indices.device)
    joined = targets >= 0
    totals = mass.new_zeros(indices.shape[0]).index_add(0, targets[joined], mass[joined])
    weights = mass.new_zeros(tokens)
    weights[joined] = mass[joined] / totals[targets[joined]]
    return targets, weights


def given(value: torch.Tensor | None, what: str) -> torch.Tensor:
    """``value``, which a cut has asked for; EngineError if it was not provided."""
    if value is None:
        message = f"a prefill method needs {what}, which it was not given"
        raise EngineError(message)
    return value
