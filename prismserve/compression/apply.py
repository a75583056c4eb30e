"""Carry out a visual plan: the only place where a method's choice touches the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prismserve.compression import loader

if TYPE_CHECKING:
    from prismserve.compression.base import VisualFeatures, VisualPlan
    from prismserve.core.types import MethodSpec


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
    tokens, plan = reduce_visual(features, spec)
    return tokens, plan.indices


def reduce_visual(features: VisualFeatures, spec: MethodSpec) -> tuple[torch.Tensor, VisualPlan]:
    """As :func:`apply_visual`, with the plan that was carried out."""
    plan = loader.visual_method(spec.name).plan(features, loader.config_of(spec, "visual"))
    survivors = features.tokens[plan.indices]
    if plan.weights is None:
        return survivors, plan
    merged = plan.weights @ features.tokens.to(plan.weights.dtype)
    # Gathered rather than multiplied, so that reduced matmul precision cannot change a token nothing was merged into.
    own = plan.weights.gather(1, plan.indices[:, None])[:, 0]
    untouched = ((plan.weights != 0).sum(1) == 1) & (own == 1)
    tokens = torch.where(untouched[:, None], survivors, merged.to(survivors.dtype))
    return tokens, plan
