"""The budget the reducing methods share: a count or a share of the image's tokens, strictly typed."""

from __future__ import annotations

import math
from typing import Any, Final

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from prismserve.compression.base import KeepConfig

KEEP_MAX: Final = 1 << 20
"""No image has more tokens; a larger count is a mistake."""


class Budget(KeepConfig):
    """``keep`` is a count (int, 1 to 1048576) or a share (float, above 0 and at most 1.0).

    A count above the image's tokens keeps them all. ``1`` is one token, ``1.0`` is all of them; because the two are
    equal in Python, and so in every table keyed by a spec, a share of 1.0 is stored as the largest count.
    """

    keep: int | float = Field(default=0.25, gt=0)

    @field_validator("keep", mode="before")
    @classmethod
    def _count_or_share(cls, value: Any) -> int | float:
        if isinstance(value, int) and not isinstance(value, bool):
            if 1 <= value <= KEEP_MAX:
                return value
        elif isinstance(value, float) and math.isfinite(value) and 0.0 < value <= 1.0:
            return value if value < 1.0 else KEEP_MAX
        kind = "keep"
        reason = "must be a count of tokens (an integer from 1 to 1048576) or a share of them (a float above 0.0, at most 1.0)"
        raise PydanticCustomError(kind, reason)
