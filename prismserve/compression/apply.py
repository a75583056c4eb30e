"""Carry out a visual plan: the only place where a method's choice touches the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.compression import loader
from prismserve.kernels.subsets import merge_rows

if TYPE_CHECKING:
    import torch

    from prismserve.compression.base import VisualFeatures, VisualPlan
    from prismserve.core.types import MethodSpec


def plan_visual(features: VisualFeatures, spec: MethodSpec) -> VisualPlan:
    """What a normalised visual spec does with one image; raises as :func:`apply_visual` does."""
    return loader.visual_method(spec.name).plan(features, loader.config_of(spec, "visual"))


def carry_out(tokens: torch.Tensor, plan: VisualPlan) -> torch.Tensor:
    """What a plan makes of tokens [N, C]: [k, C] in their dtype; those that survive unmerged are bit-equal."""
    if plan.weights is None:
        return tokens[plan.indices]
    return merge_rows(plan.weights, tokens.to(plan.weights.dtype)).to(tokens.dtype)


def apply_visual(features: VisualFeatures, spec: MethodSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce one image's tokens by a normalised visual spec.

    Args:
        features: tokens [N, C], with whatever the method ``needs``.
        spec: from :func:`prismserve.compression.loader.normalise` or a resolved plan.

    Returns:
        tokens [k, C] in the dtype and on the device of ``features.tokens``, and their raster indices, [k] int64
        ascending. Tokens that survive unmerged are bit-equal to the input.

    Raises:
        UnknownMethodError, InvalidRequestError: the spec names no method, or parameters it does not take.
        EngineError: the method needs what ``features`` does not hold.
    """
    plan = plan_visual(features, spec)
    return carry_out(features.tokens, plan), plan.indices
