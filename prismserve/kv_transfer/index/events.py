"""Changes of the index, as the stream stores them and followers replay them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prismserve.core.types import Tier

if TYPE_CHECKING:
    from prismserve.core.types import WorkerInfo


class EventKind(enum.IntEnum):
    """What happened to one worker's entries. The numbers are part of the stored form."""

    REGISTER = 1
    STATE = 2
    ANNOUNCE = 3
    RESET = 4
    DROP = 5


@dataclass(frozen=True, slots=True)
class IndexEvent:
    """One change, as followers replay it.

    Attributes:
        kind: REGISTER starts an epoch with no entries; STATE updates the record; ANNOUNCE adds and removes keys;
            RESET empties the entries and then adds; DROP ends the epoch.
        added: 32-byte keys the worker now holds.
        removed: 32-byte keys it no longer holds.
        info: the worker's record, for REGISTER and STATE.
        tier: where it holds ``added`` and held ``removed``.
    """

    kind: EventKind
    worker_id: str
    epoch: int
    added: Sequence[bytes] = ()
    removed: Sequence[bytes] = ()
    info: WorkerInfo | None = None
    tier: Tier = Tier.DEVICE
