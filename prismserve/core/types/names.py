"""Small vocabularies that every room shares."""

from __future__ import annotations

import enum
from typing import TypeAlias

BlockKey: TypeAlias = bytes
"""32-byte chained key of a full block of tokens; see :func:`prismserve.core.prompt.block_keys`."""


Scalar: TypeAlias = str | int | float | bool | None


class Role(enum.StrEnum):
    """What a worker does: only prefill, only decode (with local prefill of short suffixes), or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class WorkerState(enum.StrEnum):
    """Life of a worker as the cluster sees it."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


class Tier(enum.IntEnum):
    """Where a worker keeps a block, fastest first. The numbers are part of stored and sent forms."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class FinishReason(enum.StrEnum):
    """Why generation ended; the values are OpenAI's, plus ``error`` and ``abort``."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
