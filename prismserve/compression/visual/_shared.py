"""What several visual methods are made of: budgets, needs, rankings, places."""

from __future__ import annotations

import functools
from typing import ClassVar, Final

import torch

from prismserve.compression.base import KeepConfig, Need, Share, Stage, VisualFeatures, VisualPlan
from prismserve.core.errors import EngineError

_FIELDS: Final = {
    Need.CLS_ATTENTION: "cls_attention",
    Need.ENCODER_KEYS: "keys",
    Need.PROJECTED: "projected",
    Need.TEXT_EMBEDDINGS: "text",
    Need.TEXT_TOWER: "aligned_text",
    Need.QUESTION_ATTENTION: "asked",
    Need.SELECTOR: "selected",
    Need.UNPOOLED: "unpooled",
    Need.CODE_ATTENTION: "coded",
    Need.CLASS_TOKEN: "class_token",
    Need.CONTEXT: "guided",
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


def ranked(score: torch.Tensor) -> torch.Tensor:
    """Indices of [N] scores, highest first, ties by the lower index."""
    return torch.sort(score, descending=True, stable=True).indices


def ascending(indices: torch.Tensor) -> torch.Tensor:
    """The same indices in raster order."""
    return indices.sort().values


@functools.lru_cache(maxsize=64)
def grid_places(rows: int, columns: int, frames: int = 1) -> torch.Tensor:
    """[N, 3] float32, where each token lies: frame, row, column; on the CPU, not to be changed."""
    index = torch.arange(frames * rows * columns)
    within = index % (rows * columns)
    return torch.stack((index // (rows * columns), within // columns, within % columns), 1).float()
