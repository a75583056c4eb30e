"""Settings of the index."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from prismserve.core.config import FrozenConfig, PositiveInt, PositiveSeconds


class IndexConfig(FrozenConfig):
    """How long leases last and how much the index may hold.

    Attributes:
        lease_ttl_s: a registration ends this long after its last heartbeat, in seconds.
        heartbeat_interval_s: how often an owner renews its lease, in seconds; a third of the TTL or less survives
            two lost heartbeats.
        call_timeout_s: deadline of every call to the index, in seconds.
        poll_interval_s: longest a follower waits for events before it looks at the registry again, in seconds.
        stream_events_max: events kept for followers; one that falls further behind takes a snapshot.
        announce_keys_max: keys per event; larger announcements are split.
        snapshot_page_keys: keys per page of a snapshot.
        mirror_keys_max: keys a mirror holds at most; further ones are not mirrored.
    """

    lease_ttl_s: PositiveSeconds = 10.0
    heartbeat_interval_s: PositiveSeconds = 2.0
    call_timeout_s: PositiveSeconds = 2.0
    poll_interval_s: PositiveSeconds = 0.5
    stream_events_max: PositiveInt = 4096
    announce_keys_max: Annotated[int, Field(gt=0, le=16384)] = 1024
    snapshot_page_keys: Annotated[int, Field(gt=0, le=100_000)] = 10_000
    mirror_keys_max: PositiveInt = 8_000_000

    @model_validator(mode="after")
    def _leases_outlast_calls(self) -> Self:
        """Refuse leases that a single slow call would end."""
        if self.heartbeat_interval_s + self.call_timeout_s >= self.lease_ttl_s:
            message = (
                f"lease_ttl_s {self.lease_ttl_s:g} must exceed heartbeat_interval_s {self.heartbeat_interval_s:g} "
                f"plus call_timeout_s {self.call_timeout_s:g}"
            )
            raise ValueError(message)
        return self
