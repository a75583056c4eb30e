"""LongVU's filters of frames and patches: the parts of it that need no training.

Source: Shen et al., "LongVU: Spatiotemporal Adaptive Compression for Long Video-Language Understanding", ICML 2025
(arXiv:2410.17434), sections 3.1 and 3.3, and its published code.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from prismserve.compression.base import KeepConfig, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing, ascending, ranked
from prismserve.compression.visual._video import cosine, framed, middles


class LongVUConfig(KeepConfig):
    """Parameters of LongVU's filters.

    Attributes:
        similarity: mean cosine with the other frames of its window from which on a frame is left out.
        window: frames that are compared with one another.
        chunk: frames whose patches are compared with those of the first of them.
        frames_max: most frames that stay.
    """

    similarity: float = Field(default=0.83, ge=-1.0, le=1.0, strict=True, allow_inf_nan=False)
    window: int = Field(default=16, ge=1, le=65536, strict=True)
    chunk: int = Field(default=8, ge=2, le=65536, strict=True)
    frames_max: int = Field(default=400, ge=1, le=65536, strict=True)


class LongVU(Reducing):
    """Leave out frames that their window repeats, then patches that the first frame of their chunk has in that place.

    Frames are compared by the encoder's features end to end. In each window of frames those stay whose mean cosine with
    the others is below ``similarity``, and the middle one in any case. What stays is cut into chunks: their
    first frames stay whole, and of the tokens of the others those leave that are most like the token of the first
    frame in the same place.

    This is the training-free part of the system ("lite"): the second encoder (DINOv2, whose features the frames are
    compared by), the aggregator and the choice of frames at full resolution by the question belong to its own weights
    and are not imitated. The budget stands where the published code has a second threshold (0.8). Frames that its
    threshold leaves out come back, the least repeated first, where otherwise fewer tokens than the budget would be left;
    a budget that does not hold the first frames of the chunks treats these as a video of their own, and of one frame keeps
    evenly spaced tokens. So it is with an image. Survivors keep their positions.
    """

    name: ClassVar[str] = "longvu"
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Shen et al., LongVU, ICML 2025, arXiv:2410.17434 (frame and patch filters alone)"
    Config: ClassVar[type[LongVUConfig]] = LongVUConfig

    def plan(self, features: VisualFeatures, config: LongVUConfig) -> VisualPlan:
        """The k least repeated, in raster order."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        frames = framed(features.tokens, features)
        patches, kept = frames.shape[1], self.kept_tokens(config, features.tokens.shape[0])
        device = frames.device
        staying = filtered(repetition(frames.flatten(1), config.window), config, -(-kept // patches))
        while len(staying) > 1 and kept < len(staying[:: config.chunk]) * patches:
            staying = staying[:: config.chunk]
        if len(staying) == 1:
            return VisualPlan(staying[0] * patches + middles(patches, kept, device))
        number = torch.arange(len(staying), device=device)
        repeated = cosine(frames[staying], frames[staying[number - number % config.chunk]])
        repeated[number % config.chunk == 0] = -torch.inf
        places = (staying[:, None] * patches + torch.arange(patches, device=device)).flatten()
        return VisualPlan(ascending(places[ranked(-repeated.flatten())[:kept]]))


def repetition(frames: torch.Tensor, window: int) -> torch.Tensor:
    """[T] mean cosine of each of the frames [T, F] with the others of its window; minus infinity of a window's middle."""
    unit, parts = functional.normalize(frames, dim=-1), []
    for first in range(0, unit.shape[0], window):
        part = unit[first : first + window]
        count = part.shape[0]
        alike = part @ part.T
        mean = (alike.sum(1) - alike.diagonal()) / max(1, count - 1)
        mean[count // 2] = -torch.inf
        parts.append(mean)
    return torch.cat(parts)


def filtered(repeated: torch.Tensor, config: LongVUConfig, fewest: int) -> torch.Tensor:
    """Frames that stay, ascending: those repeated less than ``similarity`` up to ``frames_max``, at least ``fewest``."""
    unlike = min(int((repeated < config.similarity).sum()), config.frames_max)
    return ascending(ranked(-repeated)[: max(fewest, unlike)])


METHOD = LongVU()
