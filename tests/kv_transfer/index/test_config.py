"""Settings of the index are checked."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from prismserve.kv_transfer.index.config import IndexConfig


@pytest.mark.parametrize(
    "changes",
    [
        {"lease_ttl_s": 0},
        {"lease_ttl_s": float("inf")},
        {"announce_keys_max": 20_000},
        {"unknown": 1},
        {"lease_ttl_s": 4},
    ],
)
def test_unusable_settings_are_refused(changes):
    with pytest.raises(ValidationError):
        IndexConfig(**changes)
