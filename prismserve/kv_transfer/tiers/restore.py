"""Whether to restore a run of blocks or to compute it again; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prismserve.kv_transfer.costs import FIRST_GUESS_TIER_BYTES_PER_S

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FIXED_S: Final = 0.001
"""What a restore costs beside the bytes: a thread hop and a call between two engine steps."""


SAFE_SHARE: Final = 0.95
"""A restore is tried where it would have been faster in at least this share of cases, by each side's own errors."""


@dataclass(frozen=True, slots=True)
class Restore:
    """A decision and its grounds.

    Attributes:
        first: block of the chain where the run begins.
        blocks: how many to restore; 0 if none.
        restore_s: predicted time of restoring them.
        saved_s: predicted time of prefill that they spare; infinite before anything was prefilled.
        reason: in a word, for logs and metrics.
    """

    first: int
    blocks: int
    restore_s: float
    saved_s: float
    reason: str

    @property
    def worth_it(self) -> bool:
        """Whether anything is to be restored."""
        return self.blocks > 0


def decide(
    *,
    first: int,
    tiers: Sequence[str],
    block_bytes: int,
    bytes_per_s: Mapping[str, float],
    saved_s: float,
    blocks_min: int,
    restore_error: float = 1.0,
    compute_error: float = 1.0,
) -> Restore:
    """Compare restoring a run with computing it.

    Args:
        first: block of the chain where the run begins.
        tiers: per block of the run, the fastest tier that holds it.
        block_bytes: of each.
        bytes_per_s: measured rate of each tier; 0 where nothing was measured yet.
        saved_s: predicted time of prefill that the run spares; infinite where nothing was measured yet.
        blocks_min: shorter runs are not worth the trouble.
        restore_error: so many times what is predicted a restore takes when it goes badly.
        compute_error: so many times what is predicted a prefill takes when it goes well.
    """
    if len(tiers) < blocks_min:
        return Restore(first, 0, 0.0, 0.0, "too_short" if tiers else "not_held")
    seconds = {name: block_bytes / (bytes_per_s.get(name) or FIRST_GUESS_TIER_BYTES_PER_S[name]) for name in set(tiers)}
    restore_s = FIXED_S + sum(seconds[name] for name in tiers)
    if restore_s >= saved_s:
        return Restore(first, 0, restore_s, saved_s, "compute_is_cheaper")
    if restore_s * restore_error >= saved_s * compute_error:
        return Restore(first, 0, restore_s, saved_s, "too_close")
    return Restore(first, len(tiers), restore_s, saved_s, "restore_is_cheaper")
