"""What several visual methods are made of: budgets, needs, rankings, and greedy determinant maximisation."""

from __future__ import annotations

import functools
from typing import ClassVar, Final

import torch
from torch.nn import functional

from prismserve.compression.base import KeepConfig, Need, Share, Stage, VisualFeatures, VisualPlan
from prismserve.core.errors import EngineError

_FIELDS: Final = {
    Need.CLS_ATTENTION: "cls_attention",
    Need.ENCODER_KEYS: "keys",
    Need.PROJECTED: "projected",
    Need.TEXT_EMBEDDINGS: "text",
    Need.TEXT_TOWER: "aligned_text",
    Need.QUESTION_ATTENTION: "asked",
}


class Reducing:
    """The declarations most visual methods share; see :class:`prismserve.compression.base.VisualMethod`.

    A method derives from it and declares its ``name``, ``section``, ``source``, ``needs`` and how it chooses; it is
    asked to choose only where something is to be left out, and only with all it needs.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.VISUAL
    section: ClassVar[str]
    source: ClassVar[str]
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.AGNOSTIC
    nested: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()

    def kept_tokens(self, config: KeepConfig, tokens: int) -> int:
        """Exactly ``config.kept(tokens)``."""
        return config.kept(tokens)

    def complete(self, features: VisualFeatures, config: KeepConfig) -> VisualPlan | None:
        """The identity if the budget holds every token, else None.

        Raises:
            EngineError: something the method needs was not provided.
        """
        missing = sorted(need for need in self.needs if getattr(features, _FIELDS[need]) is None)
        if missing:
            message = f"{self.name} needs {', '.join(missing)}, and the model runner provided none"
            raise EngineError(message)
        count = features.tokens.shape[0]
        if self.kept_tokens(config, count) < count:
            return None
        return VisualPlan(torch.arange(count, device=features.tokens.device))


def class_attention(features: VisualFeatures) -> torch.Tensor:
    """[N] float32, attention of the class token to each patch, mean over heads."""
    if features.cls_attention is None:
        message = "the encoder's cls_attention was not provided"
        raise EngineError(message)
    return features.cls_attention.float().mean(0)


def key_metric(features: VisualFeatures) -> torch.Tensor:
    """[N, d] float32, keys of each patch, mean over heads."""
    if features.keys is None:
        message = "the encoder's keys were not provided"
        raise EngineError(message)
    return features.keys.float().mean(1)


def projected(features: VisualFeatures) -> torch.Tensor:
    """[N, D] float32, decoder inputs of all patches."""
    if features.projected is None:
        message = "the projected tokens were not provided"
        raise EngineError(message)
    return features.projected.float()


def cosine_kernel(rows: torch.Tensor) -> torch.Tensor:
    """[N, N] float32, cosine similarity of every two rows of [N, C]; rows without direction are similar to none."""
    rows = rows.float()
    unit = functional.normalize(rows, dim=-1)
    kernel = unit @ unit.T
    # Exactly 1, so that rounding does not decide between tokens that are equally good.
    kernel.diagonal().copy_((rows != 0).any(dim=1))
    return kernel


def ranked(score: torch.Tensor) -> torch.Tensor:
    """Indices of [N] scores, highest first, ties by the lower index."""
    return torch.sort(score, descending=True, stable=True).indices


def ascending(indices: torch.Tensor) -> torch.Tensor:
    """The same indices in raster order."""
    return indices.sort().values


@functools.lru_cache(maxsize=64)
def squared_distances(rows: int, columns: int, frames: int = 1) -> torch.Tensor:
    """[N, N] float32, squared distance of every two tokens, in patches and frames; on the CPU, not to be changed."""
    index = torch.arange(frames * rows * columns)
    within = index % (rows * columns)
    places = torch.stack((index // (rows * columns), within // columns, within % columns), 1).float()
    return (places[:, None] - places[None, :]).square().sum(-1)


def greedy_determinant(kernel: torch.Tensor, picks: int) -> torch.Tensor:
    """Choose rows of a positive semi-definite kernel one after another, each to enlarge the determinant most.

    Greedy MAP of a determinantal point process by incremental Cholesky factors (Chen et al., "Fast Greedy MAP
    Inference for Determinantal Point Process to Improve Recommendation Diversity", NeurIPS 2018, algorithm 1):
    O(N picks^2). Once what is left lies in the span of what was chosen, the rest is taken in order of index.

    Args:
        kernel: [N, N] float32.
        picks: how many, at most N.

    Returns:
        [picks] int64 in the order they were chosen; ties go to the lower index.
    """
    count = kernel.shape[0]
    gain = kernel.diagonal().clone()
    factors = kernel.new_zeros((picks, count))
    chosen = torch.empty(picks, dtype=torch.int64, device=kernel.device)
    for i in range(picks):
        pick = gain.argmax()
        chosen[i] = pick
        scale = gain[pick].clamp(min=1e-10).rsqrt()
        row = (kernel[pick] - factors[:i, pick] @ factors[:i]) * scale
        factors[i] = row
        # What is left is at least zero in exact arithmetic; what was chosen must stay below it.
        gain = (gain - row.square()).clamp_(min=0.0)
        gain[chosen[: i + 1]] = -1.0
    return chosen
