"""Settings of the transfer layer of one worker."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from prismserve.core.config import FrozenConfig, PositiveInt, PositiveSeconds

_MIB = 1 << 20
_SMALLEST_PAGE_BYTES = 4096
_PROBE_SHARE = 16


class TransferConfig(FrozenConfig):
    """How much memory, time and concurrency transfers of one worker may take.

    Attributes:
        arena_bytes: shared memory that senders write into and staged writes leave from. NIXL commits all of it when
            it registers it; otherwise pages are committed as they are touched.
        page_bytes: granularity of leases; a power of two of at least 4096.
        staging_share: part of the arena kept for this worker's own outgoing writes, so that two workers whose
            landing pages are all leased can still send to each other.
        lease_ttl_s: a lease ends this long after it was granted.
        leases_max: leases open or in quarantine at one time.
        transports: names, best first.
        link_choice: "measured" prefers whichever common transport writes fastest to a peer (a short probe when the
            first link opens, then real transfers; a later one must be 1.25 times as fast as one named before it);
            "order" takes the first that works.
        probe_interval_s: links to a peer that is written to are measured again after this long.
        host: address that transports which listen bind to; a worker puts its own here.
        notify_timeout_s: after a commit, how long a payload that has not arrived intact is waited for.
        write_timeout_s: how long one write, or the wait for staging memory, may take.
        write_attempts: how often one write is tried, over all links, before the transfer fails.
        write_bytes_max: pieces longer than this (before encoding) are cut along tokens.
        coalesce_bytes: pieces that wait leave as one write up to this length.
        writes_inflight_max: writes of one transfer that have started and not finished.
        pieces_queued_max: pieces of one transfer that wait to be encoded.
        link_backoff_s: how long a link is passed over after its first failure; doubles with each further one.
        link_backoff_max_s: upper end of that doubling.
        receive_spin_s: after something has arrived over a transport that cannot wake a sleeping thread, it is asked
            without pause for this long: most of what such a transport still has to do needs the receiver's help.
        poll_interval_s: pause between looks at a transport that cannot wake a sleeping thread, while leases are open.
    """

    arena_bytes: PositiveInt = 256 * _MIB
    page_bytes: PositiveInt = 65536
    staging_share: float = Field(default=0.25, gt=0.0, lt=1.0)
    lease_ttl_s: PositiveSeconds = 30.0
    leases_max: PositiveInt = 1024
    transports: tuple[str, ...] = Field(default=("nixl", "shm"), min_length=1)
    link_choice: Literal["measured", "order"] = "measured"
    probe_interval_s: PositiveSeconds = 30.0
    host: str = Field(default="127.0.0.1", min_length=1)
    notify_timeout_s: PositiveSeconds = 5.0
    write_timeout_s: PositiveSeconds = 10.0
    write_attempts: PositiveInt = 3
    write_bytes_max: PositiveInt = 16 * _MIB
    coalesce_bytes: PositiveInt = 2 * _MIB
    writes_inflight_max: PositiveInt = 16
    pieces_queued_max: PositiveInt = 8192
    link_backoff_s: PositiveSeconds = 0.5
    link_backoff_max_s: PositiveSeconds = 30.0
    receive_spin_s: float = Field(default=0.001, ge=0.0, le=1.0)
    poll_interval_s: PositiveSeconds = 0.0001

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.page_bytes < _SMALLEST_PAGE_BYTES or self.page_bytes & (self.page_bytes - 1):
            message = f"page_bytes must be a power of two of at least {_SMALLEST_PAGE_BYTES}, got {self.page_bytes}"
            raise ValueError(message)
        if self.staging_pages < 1 or self.landing_pages < 1:
            message = (
                f"arena_bytes of {self.arena_bytes} with staging_share {self.staging_share} must give at least one "
                f"page of {self.page_bytes} bytes on either side"
            )
            raise ValueError(message)
        if len(set(self.transports)) != len(self.transports):
            message = f"transports names one twice: {', '.join(self.transports)}"
            raise ValueError(message)
        return self

    @property
    def staging_pages(self) -> int:
        """Pages for outgoing writes."""
        return int(self.arena_bytes // self.page_bytes * self.staging_share)

    @property
    def landing_pages(self) -> int:
        """Pages that peers may write to; they come first in the arena."""
        return self.arena_bytes // self.page_bytes - self.staging_pages

    @property
    def probe_pages(self) -> int:
        """The last of them, which are never leased: peers measure their links there. None in a very small arena."""
        return min(_MIB // self.page_bytes, self.landing_pages // _PROBE_SHARE)
