"""What became of each visual token: kept, merged into another, or dropped, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.compression.base import VisualPlan
    from prismserve.compression.cuts import Cut, CutPlan, Grid

DROPPED: Final = -1
GONE: Final = -2
"""It had left in an earlier stage."""


@dataclass(frozen=True, slots=True)
class Medium:
    """One image or video as the method saw it.

    Attributes:
        grid: how its tokens lie.
        box: left, top, right, bottom of the part of the picture (or of each frame) that the grid covers, in pixels; a
            model that crops sees less than the whole.
    """

    grid: Grid
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Stage:
    """One reduction.

    Attributes:
        stage: ``visual`` or ``prefill``.
        method: its name.
        layer: decoder layer before which it happens; None before the decoder.
        fates: one per place of all media, frame by frame and row by row: the place itself if the token stays, the place
            of the one it is mostly merged into, ``DROPPED``, or ``GONE``. Places count through all media.
    """

    stage: str
    method: str
    layer: int | None
    fates: tuple[int, ...]

    @property
    def kept(self) -> int:
        """Tokens that go on."""
        return sum(fate == place for place, fate in enumerate(self.fates))

    @property
    def dropped(self) -> int:
        """Tokens that are lost here."""
        return self.fates.count(DROPPED)

    @property
    def merged(self) -> int:
        """Tokens that are folded into others here."""
        return len(self.fates) - self.kept - self.dropped - self.fates.count(GONE)

    @property
    def title(self) -> str:
        """One line: the method and where it acts."""
        where = "before the decoder" if self.layer is None else f"before layer {self.layer}"
        return f"{self.method}, {where}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """All stages of one request; the last one says what is left."""

    media: tuple[Medium, ...]
    stages: tuple[Stage, ...]

    @property
    def places(self) -> int:
        """Places of all media."""
        return sum(medium.grid.tokens for medium in self.media)

    def document(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "media": [
                {
                    "frames": medium.grid.frames,
                    "rows": medium.grid.rows,
                    "columns": medium.grid.columns,
                    "box_px": [round(edge, 3) for edge in medium.box],
                }
                for medium in self.media
            ],
            "stages": [
                {
                    "stage": stage.stage,
                    "method": stage.method,
                    "layer": stage.layer,
                    "kept": stage.kept,
                    "merged": stage.merged,
                    "dropped": stage.dropped,
                    "fates": list(stage.fates),
                }
                for stage in self.stages
            ],
        }


def visual_stage(method: str, plans: Sequence[VisualPlan], counts: Sequence[int]) -> Stage:
    """What a visual method did.

    Args:
        method: its name.
        plans: one per medium, over the tokens of its grid.
        counts: tokens of each medium.
    """
    fates: list[int] = []
    for plan, count in zip(plans, counts, strict=True):
        first = len(fates)
        own = [DROPPED] * count
        survivors = plan.indices.tolist()
        if plan.weights is not None:
            strongest, row = plan.weights.abs().max(0)
            joined = zip(strongest.tolist(), row.tolist(), strict=True)
            own = [first + survivors[number] if weight > 0 else DROPPED for weight, number in joined]
        for place in survivors:
            own[place] = first + place
        fates += own
    return Stage("visual", method, None, tuple(fates))


def cut_stages(method: str, cuts: Sequence[Cut], plans: Sequence[CutPlan], before: Sequence[int]) -> tuple[Stage, ...]:
    """What a prefill method did, one stage for each cut.

    Args:
        method: its name.
        cuts: in order.
        plans: what was chosen at each.
        before: fates before the first cut; all their own places if nothing has happened yet.
    """
    there = [place for place, fate in enumerate(before) if fate == place]
    stages: list[Stage] = []
    for cut, plan in zip(cuts, plans, strict=True):
        fates = [GONE] * len(before)
        survivors = [there[index] for index in plan.indices.tolist()]
        targets = [DROPPED] * len(there) if plan.targets is None else plan.targets.tolist()
        for place, target in zip(there, targets, strict=True):
            fates[place] = survivors[target] if target >= 0 else DROPPED
        for place in survivors:
            fates[place] = place
        stages.append(Stage("prefill", method, cut.layer, tuple(fates)))
        there = survivors
    return tuple(stages)


def patch_map(explanation: Explanation, columns_max: int = 64) -> list[str]:
    """The first frame of the first medium in characters, or nothing where it is wider than ``columns_max``.

    ``#`` is kept to the end, ``+`` was merged somewhere, ``.`` was dropped; with several stages a token that left is
    shown by the number of the stage in which it did, up to 9.
    """
    grid = explanation.media[0].grid
    if grid.columns > columns_max or not explanation.stages:
        return []
    several = len(explanation.stages) > 1
    cells: list[str] = []
    for place in range(grid.rows * grid.columns):
        cell = "#"
        for number, stage in enumerate(explanation.stages, 1):
            fate = stage.fates[place]
            if fate != place:
                cell = str(min(number, 9)) if several else "." if fate == DROPPED else "+"
                break
        cells.append(cell)
    return [" ".join(cells[row * grid.columns : (row + 1) * grid.columns]) for row in range(grid.rows)]
