"""VQToken's codes without its trained attention: K-means over all tokens of a video, a baseline.

Source: Zhang and Fu, "VQToken: Neural Discrete Token Representation Learning for Extreme Token Reduction in Video Large
Language Models", NeurIPS 2025 (arXiv:2503.16980), the clustering of its section 3, and its published code.
"""

from __future__ import annotations

from typing import ClassVar, Final

import torch
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from torch.nn import functional

from prismserve.compression.base import KeepConfig, VisualFeatures, VisualPlan
from prismserve.compression.visual._shared import Reducing
from prismserve.compression.visual._video import Merging, centre_weights, middles

_TIE: Final = 1e-5


class VQTokenConfig(KeepConfig):
    """Parameters of the K-means baseline.

    Attributes:
        keep: codes.
        rounds: most rounds of K-means.
        trained: the attention of a map of codes to the codes. It was trained with VQToken's own model and is
            ``vqtoken_attention``, so ``True`` is refused here.
    """

    keep: int | float = Field(default=32, gt=0)
    rounds: int = Field(default=10, ge=1, le=1024, strict=True)
    trained: bool = Field(default=False, strict=True)

    @field_validator("trained")
    @classmethod
    def _untrained(cls, value: bool) -> bool:  # noqa: FBT001 - pydantic calls it
        if value:
            kind = "needs_weights"
            reason = "the attention over codes needs VQToken's own trained weights; it is the method vqtoken_attention"
            raise PydanticCustomError(kind, reason)
        return value


class VQToken(Reducing):
    """K-means on tokens of length 1; a code is the mean of its members, in the place of the one nearest to its centre.

    This is the paper's vector quantisation alone, with a fixed number of codes. The system feeds its decoder what a
    trained attention makes of codes and positions (``vqtoken_attention``); without that training this is a baseline, and
    not VQToken.

    K-means starts from evenly spaced tokens instead of random ones, so that equal media give equal codes. A cluster that
    becomes empty is given the token that is least like its own centre. Ties go to the lower index.
    """

    name: ClassVar[str] = "vqtoken"
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Zhang and Fu, VQToken, NeurIPS 2025, arXiv:2503.16980 (K-means baseline)"
    Config: ClassVar[type[VQTokenConfig]] = VQTokenConfig

    def plan(self, features: VisualFeatures, config: VQTokenConfig) -> VisualPlan:
        """``indices`` [k] and ``weights`` [k, N], each row the mean of a cluster."""
        whole = self.complete(features, config)
        if whole is not None:
            return whole
        unit = functional.normalize(features.tokens.float(), dim=-1)
        count = unit.shape[0]
        kept = self.kept_tokens(config, count)
        likeness, owner = clusters(unit, middles(count, kept, unit.device), config.rounds)
        nearest = torch.full((kept,), count, device=unit.device)
        best = likeness.new_full((kept,), -torch.inf).scatter_reduce(0, owner, likeness, "amax")
        # Two members are equally near to their mean, whatever rounding says.
        is_best = likeness >= best[owner] - _TIE
        index = torch.arange(count, device=unit.device)
        nearest.scatter_reduce_(0, owner[is_best], index[is_best], "amin")
        merging = Merging(count, unit.device)
        merging.fold(nearest, nearest[owner], index, centre_weights(owner, nearest, 0.0, fair=True))
        return merging.plan()


def clusters(unit: torch.Tensor, starts: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K-means by cosine.

    Args:
        unit: [N, C] float32 of length 1 (or 0).
        starts: [k] int64, the tokens that are the first centres.
        rounds: most rounds; fewer if nothing changes.

    Returns:
        [N] float32 likeness of each token to its centre, and [N] int64, the number of its cluster; none is empty.
    """
    centres, owner = unit[starts], torch.full((unit.shape[0],), -1, device=unit.device)
    likeness, index = unit.new_zeros(unit.shape[0]), torch.arange(unit.shape[0], device=unit.device)
    for _ in range(rounds):
        before = owner
        likeness, owner = (unit @ centres.T).max(1)
        fill_empty(likeness, owner, centres.shape[0])
        if torch.equal(owner, before):
            break
        # A product, because adding up by index has no fixed order on a GPU.
        inside = torch.zeros(centres.shape[0], unit.shape[0], device=unit.device)
        inside[owner, index] = 1.0
        centres = functional.normalize(inside @ unit, dim=-1)
    return likeness, owner


def fill_empty(likeness: torch.Tensor, owner: torch.Tensor, count: int) -> None:
    """Give every cluster without tokens the one least like its centre, of a cluster that has others; in place."""
    members = torch.bincount(owner, minlength=count)
    for empty in (members == 0).nonzero()[:, 0].tolist():
        token = likeness.masked_fill(members[owner] < 2, torch.inf).argmin()
        members[owner[token]] -= 1
        owner[token], likeness[token], members[empty] = empty, 1.0, 1


METHOD = VQToken()
