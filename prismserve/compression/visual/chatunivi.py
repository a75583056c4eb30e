"""Chat-UniVi's dynamic tokens: frames are clustered to events, the tokens of an event to three scales of clusters.

Source: Jin et al., "Chat-UniVi: Unified Visual Representation Empowers Large Language Models with Image and Video
Understanding", CVPR 2024 (arXiv:2311.08046), section 3.1, and its published code.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import numpy as np
import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig, VisualFeatures, VisualPlan
from prismserve.compression.density import density_centres
from prismserve.compression.visual._shared import Reducing
from prismserve.compression.visual._video import Merging, even_shares, framed

Clusters: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Features [c, C] and what each of the m tokens counts in them, [c, m], rows of sum 1."""


class ChatUniViConfig(KeepConfig):
    """Parameters of Chat-UniVi's clustering.

    Attributes:
        event_frames: frames per event on average; there are so many times fewer events than frames (at least one).
        neighbours: of the density of frames and of single tokens.
        neighbours_coarse: of the density of clusters, at the second and third scale.
    """

    event_frames: int = Field(default=16, ge=1, le=65536, strict=True)
    neighbours: int = Field(default=5, ge=1, le=1024, strict=True)
    neighbours_coarse: int = Field(default=3, ge=1, le=1024, strict=True)


class ChatUniVi(Reducing):
    """DPC-KNN clusters of the encoder's features, at three scales of which each has half the clusters of the one before.

    Frames are clustered by their mean features to events, which need not be stretches of time. Each frame's tokens become
    4 m clusters, these 2 m, and these m; the clusters of all frames of an event, scale by scale, are clustered again to as
    many. A cluster is the mean of the clusters in it, so that all three scales stand side by side: the paper's 64 + 32 +
    16 = 112 tokens for an image, and for an event. Events have equal parts of the budget, scales 4 : 2 : 1 of it.

    The published model was trained with these tokens and without positions in a grid; here a cluster takes the place of
    its first token (in order of time and place) that no finer cluster has taken, or else the nearest free one, so that
    it applies to models that were not. Ties are broken by index, not by noise. An image is one event of one frame.
    """

    name: ClassVar[str] = "chatunivi"
    section: ClassVar[str] = "IV-A.2a"
    source: ClassVar[str] = "Jin et al., Chat-UniVi, CVPR 2024, arXiv:2311.08046 (clustering alone)"
    Config: ClassVar[type[ChatUniViConfig]] = ChatUniViConfig

    def plan(self, features: VisualFeatures, config: ChatUniViConfig) -> VisualPlan:
        """``indices`` [k] and ``weights`` [k, N], each row of sum 1."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        frames = framed(features.tokens, features)
        count, patches = features.tokens.shape[0], frames.shape[1]
        events = max(1, frames.shape[0] // config.event_frames)
        _, event = density_centres(frames.mean(1), events, config.neighbours)
        members = [(event == number).nonzero()[:, 0] for number in range(events)]
        shares = even_shares(self.kept_tokens(config, count), [len(inside) * patches for inside in members])
        merging = Merging(count, frames.device)
        for inside, share in zip(members, shares, strict=True):
            if share:
                where = (inside[:, None] * patches + torch.arange(patches, device=inside.device)).flatten()
                _event(merging, frames[inside], where, share, config)
        return merging.plan()


def _event(merging: Merging, frames: torch.Tensor, where: torch.Tensor, share: int, config: ChatUniViConfig) -> None:
    """Put the clusters of one event, whose tokens [f, n, C] stand at ``where`` [f n], at free places of it."""
    count, patches = frames.shape[:2]
    scales = (share - 2 * share // 7 - share // 7, 2 * share // 7, share // 7)
    seen: list[list[Clusters]] = [[] for _ in scales]
    for number, frame in enumerate(frames):
        inside = torch.zeros(patches, count * patches, device=frame.device)
        inside[:, number * patches : (number + 1) * patches] = torch.eye(patches, device=frame.device)
        clusters = frame, inside
        for scale, wanted in enumerate(scales):
            if wanted:
                clusters = coarser(clusters, min(wanted, len(clusters[0])), _neighbours(scale, config))
                seen[scale].append(clusters)
    taken = torch.zeros(count * patches, dtype=torch.bool)
    for scale, wanted in enumerate(scales):
        if wanted:
            features, weights = (torch.cat(parts) for parts in zip(*seen[scale], strict=True))
            _, rows = coarser((features, weights), wanted, _neighbours(scale, config))
            places = where[free_places(rows, taken).to(where.device)]
            cluster, token = rows.nonzero(as_tuple=True)
            merging.fold(places, places[cluster], where[token], rows[cluster, token])


def coarser(clusters: Clusters, count: int, neighbours: int) -> Clusters:
    """Fewer clusters, each the mean of those in it."""
    features, weights = clusters
    _, owner = density_centres(features, count, neighbours)
    inside = torch.zeros(count, features.shape[0], device=features.device)
    inside[owner, torch.arange(owner.shape[0], device=owner.device)] = 1.0
    inside /= inside.sum(1, keepdim=True)
    return inside @ features, inside @ weights


def free_places(weights: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """[c] int64, a place for each cluster: its first token not taken, or else the free one nearest to its first.

    Args:
        weights: [c, m], above 0 where a token is in a cluster.
        taken: [m] bool on the CPU, changed: what is given becomes taken; at least c are free.
    """
    free, places = ~taken.numpy(), []
    for inside in (weights > 0).cpu().numpy():
        own = np.flatnonzero(inside & free)
        if own.size:
            place = int(own[0])
        else:
            left = np.flatnonzero(free)
            place = int(left[np.abs(left - int(inside.argmax())).argmin()])
        free[place] = False
        taken[place] = True
        places.append(place)
    return torch.tensor(places, dtype=torch.int64)


def _neighbours(scale: int, config: ChatUniViConfig) -> int:
    return config.neighbours_coarse if scale else config.neighbours


METHOD = ChatUniVi()
