"""FastVID: cut a video into scenes, keep each frame's salient tokens, fold the others into anchors of a few key frames.

Source: Shen et al., "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", NeurIPS 2025
(arXiv:2503.11187), sections 3.2 and 3.3, and its published code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from prismserve.compression.base import KeepConfig, Need, VisualFeatures, VisualPlan
from prismserve.compression.density import density_centres
from prismserve.compression.visual._shared import Reducing, ascending, projected, ranked
from prismserve.compression.visual._video import Merging, centre_weights, cosine, even_shares, framed

if TYPE_CHECKING:
    from collections.abc import Sequence


class FastVIDConfig(KeepConfig):
    """Parameters of FastVID.

    Attributes:
        keep: the budget, a tenth in the paper.
        scenes: fewest scenes, as far as there are frames (c).
        similarity: cosine of consecutive frames below which a scene ends in any case (tau).
        context: share of the kept tokens that are anchors (d).
        key_every: every so many frames of a scene, counted from its last, hold its anchors (p).
        own: weight of an anchor beside the mean of what it is given (beta).
        neighbours: of a token's density.
    """

    keep: int | float = Field(default=0.1, gt=0)
    scenes: int = Field(default=8, ge=1, le=65536, strict=True)
    similarity: float = Field(default=0.9, ge=-1.0, le=1.0, strict=True, allow_inf_nan=False)
    context: float = Field(default=0.4, ge=0.0, le=1.0, strict=True, allow_inf_nan=False)
    key_every: int = Field(default=4, ge=1, le=65536, strict=True)
    own: float = Field(default=0.6, ge=0.0, le=1.0, strict=True, allow_inf_nan=False)
    neighbours: int = Field(default=4, ge=1, le=1024, strict=True)


class FastVID(Reducing):
    """Salient tokens of every frame, and density-chosen anchors in key frames that take in the rest of their scene.

    A frame has an equal part of the budget: ``context`` of it (rounded down) is given to its scene's anchors, the rest
    keeps the frame's most salient tokens. A scene's anchors lie in its key frames, in equal parts: the tokens with the
    largest product of density and distance to a denser one, among those of that frame that are not salient. Every other
    token of the scene joins the anchor most like it (cosine of decoder inputs), which becomes w of itself and 1 - w of
    their mean, w = max(own, 1 / (members + 1)).

    Differences from the published code. It takes a frame's features and its tokens' salience from the pooling head of
    SigLIP, which the video encoders served here do not give; in their place are the mean of a frame's tokens, and how
    little a token is like that mean (1 - cosine). Parts of the budget that do not divide are spread evenly instead of
    being dropped. Where the key frames are too few for a scene's anchors, there are more of them. Ties are broken by
    index, not by noise. Survivors keep their positions, as there.

    An image is one scene of one frame.
    """

    name: ClassVar[str] = "fastvid"
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Shen et al., FastVID, NeurIPS 2025, arXiv:2503.11187"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROJECTED})
    Config: ClassVar[type[FastVIDConfig]] = FastVIDConfig

    def plan(self, features: VisualFeatures, config: FastVIDConfig) -> VisualPlan:
        """``indices`` [k] and ``weights`` [k, N], each row of sum 1."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        frames = framed(projected(features), features)
        count, patches = frames.shape[:2]
        means = frames.mean(1)
        distinct = 1.0 - cosine(frames, means[:, None])
        shares = even_shares(self.kept_tokens(config, count * patches), [patches] * count)
        anchors = [int(share * config.context) for share in shares]
        order = [ranked(row) for row in distinct]
        salient = [order[frame][: shares[frame] - anchors[frame]] for frame in range(count)]
        rest = [ascending(order[frame][len(salient[frame]) :]) for frame in range(count)]
        merging = Merging(count * patches, frames.device)
        merging.keep(torch.cat([frame * patches + places for frame, places in enumerate(salient)]))
        for first, last in scenes(cosine(means[1:], means[:-1]), config.scenes, config.similarity):
            held = anchors_of_frames(
                [len(places) for places in rest[first : last + 1]], sum(anchors[first : last + 1]), config
            )
            chosen = [
                frame * patches + rest[frame][density_centres(frames[frame, rest[frame]], share, config.neighbours)[0]]
                for frame, share in enumerate(held, start=first)
                if share
            ]
            if chosen:
                members = torch.cat([frame * patches + rest[frame] for frame in range(first, last + 1)])
                _fold(merging, frames.flatten(0, 1), torch.cat(chosen), members, config.own)
        return merging.plan()


def scenes(alike: torch.Tensor, fewest: int, similarity: float) -> list[tuple[int, int]]:
    """Scenes (first frame, last frame) of T frames in order.

    Args:
        alike: [T - 1] cosine of a frame with the next one.
        fewest: cuts are made at the ``fewest - 1`` lowest of them,
        similarity: and wherever they are below this.
    """
    cut = alike < similarity
    cut[alike.argsort(stable=True)[: fewest - 1]] = True
    ends = [*cut.nonzero()[:, 0].tolist(), alike.shape[0]]
    return list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))


def anchors_of_frames(room: Sequence[int], anchors: int, config: FastVIDConfig) -> list[int]:
    """How many of a scene's anchors each of its frames holds, at most its ``room``, which together is enough."""
    every = config.key_every
    while True:
        keys = [(len(room) - 1 - place) % every == 0 for place in range(len(room))]
        capacities = [tokens if key else 0 for tokens, key in zip(room, keys, strict=True)]
        if every == 1 or sum(capacities) >= anchors:
            return even_shares(anchors, capacities)
        every -= 1


def _fold(merging: Merging, tokens: torch.Tensor, anchors: torch.Tensor, members: torch.Tensor, own: float) -> None:
    """Fold ``members`` [m], places in ``tokens`` [N, D], into ``anchors`` [a], which are among them."""
    unit = functional.normalize(tokens, dim=-1)
    owner = (unit[members] @ unit[anchors].T).argmax(1)
    centres = torch.searchsorted(members, anchors)
    owner[centres] = torch.arange(anchors.shape[0], device=owner.device)
    merging.fold(anchors, anchors[owner], members, centre_weights(owner, centres, own, fair=True))


METHOD = FastVID()
