"""lens: what the question looks at halfway through the decoder, without keeping the same thing twice.

Our answer, with the question, to whether tokens should be chosen for being important or for being different. The
kernel is that of determinantal point processes with quality and similarity (Kulesza and Taskar, "Determinantal Point
Processes for Machine Learning", 2012, section 3.1); the visual method ``prism`` is the same before the decoder, without
the question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from prismserve.compression.base import KeepConfig, Share, Stage
from prismserve.compression.cuts import Cut, CutNeed, CutPlan, Raters, Tap
from prismserve.compression.prefill._common import given, layers_at
from prismserve.kernels.subsets import Fading, largest_determinant

if TYPE_CHECKING:
    from prismserve.compression.cuts import CutInputs

_APART = 1e4
"""Distance between two images or videos, in patches: nothing fades across them any more."""


class LensConfig(KeepConfig):
    """Budget, place and dial.

    Attributes:
        keep: visual tokens that go on.
        depth: share of the layers that see all of them. On 60 scenes of the bundled model, apart from the held-out
            ones, ranking by attention alone at 24 of 196 tokens gave 84.2 at 2 of 6 layers and 94.8 at 3.
        theta: 0 looks at diversity alone, a large value at attention alone. In the same measurement, at 3 of 6 layers,
            0.5 gave 97.5, and 1 with the largest head in place of the mean 95.7.
        locality: share of two tokens' similarity that fades with their distance in the grid.
        radius: standard deviation of that fading, in patches.
    """

    keep: int | float = Field(default=0.125, gt=0)
    depth: float = Field(default=0.5, gt=0.0, lt=1.0, strict=True, allow_inf_nan=False)
    theta: float = Field(default=0.5, ge=0.0, le=8.0, strict=True, allow_inf_nan=False)
    locality: float = Field(default=0.5, ge=0.0, le=1.0, strict=True, allow_inf_nan=False)
    radius: float = Field(default=3.0, gt=0.0, le=1024.0, strict=True, allow_inf_nan=False)


class Lens:
    """Greedy determinant maximisation over ``diag(r^theta) S diag(r^theta)`` at one cut.

    r is the attention of the prompt's last token in the layer before the cut, mean over heads, scaled so that its largest
    is 1. S is the cosine of hidden states times ``1 - locality + locality exp(-distance^2 / (2 radius^2))``; tokens of
    different images are infinitely far apart. Nothing is merged; survivors keep their positions. ``QRY``.
    """

    name: ClassVar[str] = "lens"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.PREFILL
    section: ClassVar[str] = "own"
    source: ClassVar[str] = "this project; kernel of Kulesza and Taskar, 2012"
    training_free: ClassVar[bool] = True
    share: ClassVar[Share] = Share.QUERY
    nested: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    Config: ClassVar[type[LensConfig]] = LensConfig

    def cuts(self, config: LensConfig, layers: int) -> tuple[Cut, ...]:
        """One."""
        (layer,) = layers_at([config.depth], layers)
        return (Cut(layer, Tap.BEFORE, Raters.LAST, frozenset({CutNeed.HIDDEN})),)

    def kept_tokens(self, config: LensConfig, layers: int, tokens: int) -> tuple[int, ...]:  # noqa: ARG002
        """Exactly the budget."""
        return (min(tokens, config.kept(tokens)),)

    def plan(self, cut: int, inputs: CutInputs, config: LensConfig) -> CutPlan:  # noqa: ARG002 - there is one cut
        """The k chosen, ascending."""
        kept = min(inputs.tokens, config.kept(inputs.tokens))
        if kept == inputs.tokens:
            return CutPlan(torch.arange(kept, device=inputs.places.device))
        attention = given(inputs.scores, "the last row's attention")[-1].mean(0)
        quality = (attention / attention.max().clamp(min=1e-12)) ** config.theta
        hidden = given(inputs.hidden, "hidden states").float()
        fading = Fading(grid_places(inputs), config.locality, config.radius) if config.locality > 0.0 else None
        return CutPlan(largest_determinant(hidden, kept, quality, fading).sort().values)


def grid_places(inputs: CutInputs) -> torch.Tensor:
    """[N, 3] float32, where each token lies: frame, row, column, with images and videos far apart."""
    shapes = torch.tensor([(grid.rows, grid.columns) for grid in inputs.grids], device=inputs.places.device)
    rows, columns = shapes[inputs.medium].unbind(1)
    within = inputs.places % (rows * columns)
    frame = inputs.places // (rows * columns) + inputs.medium * _APART
    return torch.stack((frame, within // columns, within % columns), 1).float()


METHOD = Lens()
