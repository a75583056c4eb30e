"""What one forward pass computes of one sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prismserve.engine.cutting import Stage
    from prismserve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class RunItem:
    """A run of consecutive cache slots of one sequence.

    Attributes:
        sequence: whose table covers ``start + tokens`` slots.
        start: first slot to compute; all before it hold KV.
        tokens: slots to compute.
        samples: whether logits of the last slot are wanted.
        stage: what happens to the rows between the layers, where the sequence's prompt is under a prefill method.
    """

    sequence: Sequence
    start: int
    tokens: int
    samples: bool
    stage: Stage | None = None

    def rows(self, layer: int) -> int:
        """Rows of the batch that are this run's in a layer, once the layer has begun."""
        return self.tokens if self.stage is None else self.stage.counts[layer]

    def slots(self, layer: int) -> tuple[int, int]:
        """First cache slot of the layer that the run fills, and how many; before the sequence has advanced."""
        ragged = self.sequence.ragged
        return self.start if ragged is None else ragged[layer].tokens, self.rows(layer)
