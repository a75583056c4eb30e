"""Visual methods that also choose, at every step of decoding, which visual tokens the deeper layers read.

Nothing is deleted: all KV stays in the pool, and a token that is not read now is read again when the attention of a later
step says so. The method decides from one layer's attention; ``prismserve/engine/focusing.py`` carries it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Glance:
    """What one step of decoding saw of the visual tokens, and what it reads of them.

    Attributes:
        scores: [N] float32, attention of the newest token to each visual token in the layer that was looked at, mean
            over heads.
        read: [k] int64, ascending, the visual tokens that the layers behind it read in this step; None for all of them.
    """

    scores: torch.Tensor
    read: torch.Tensor | None


@runtime_checkable
class Focuses(Protocol):
    """A visual method that also acts while decoding."""

    def focus_layer(self, config: Any, layers: int) -> int | None:
        """The first layer that reads a choice; the one before it is looked at. None where nothing is left out.

        Args:
            config: an instance of ``Config``.
            layers: of the decoder.

        Returns:
            1 to ``layers - 1``.

        Raises:
            InvalidRequestError: the configuration names a layer there is not.
        """
        ...

    def glance(self, scores: torch.Tensor, before: Glance | None, config: Any) -> Glance:
        """Choose for one step; pure, deterministic, ties broken by index.

        Args:
            scores: as in :class:`Glance`.
            before: of the step before; None at the first, and where the sequence has come from another worker.
            config: an instance of ``Config``.
        """
        ...
