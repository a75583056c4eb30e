"""Which link to try next: pure bookkeeping of failures and of measured bandwidth, with the clock passed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from prismserve.kv_transfer.config import TransferConfig

_MEASURABLE_BYTES: Final = 65536
"""Writes shorter than this tell of latency, not of bandwidth."""
_WEIGHT: Final = 0.2
_MARGIN: Final = 1.25
"""A transport displaces one that is configured before it only if it is this much faster: links do not flap."""


@dataclass(slots=True)
class LinkRate:
    """Bandwidth of one link as writes show it: an exponential average, weight 0.2 for the newest.

    Writes overlap, so a write counts from the end of the one before it if that ended later than it began.
    """

    bytes_per_s: float = 0.0
    _busy_until_s: float = float("-inf")

    def wrote(self, nbytes: int, started_s: float, ended_s: float) -> None:
        """Learn from one write."""
        seconds = ended_s - max(started_s, self._busy_until_s)
        self._busy_until_s = ended_s
        if nbytes >= _MEASURABLE_BYTES and seconds > 0.0:
            self.probed(nbytes / seconds)

    def probed(self, bytes_per_s: float) -> None:
        """Learn from one measurement."""
        first = self.bytes_per_s == 0.0
        self.bytes_per_s = bytes_per_s if first else self.bytes_per_s + _WEIGHT * (bytes_per_s - self.bytes_per_s)


class LinkHealth:
    """Failures and bandwidth per transport towards one peer.

    A failed transport is passed over for a while that doubles with each failure in a row. It is never ruled out: when
    every transport is passed over, the one whose turn comes first is tried anyway, so that one transient error cannot
    take a healthy pair out of service.
    """

    def __init__(self, config: TransferConfig) -> None:
        self._config = config
        self._failures: dict[str, int] = {}
        self._again_s: dict[str, float] = {}
        self._rates: dict[str, LinkRate] = {}

    def failed(self, transport: str, now_s: float) -> None:
        """Count a failure and start the pause."""
        failures = self._failures.get(transport, 0) + 1
        self._failures[transport] = failures
        pause_s = self._config.link_backoff_s * 2.0 ** min(failures - 1, 32)
        self._again_s[transport] = now_s + min(pause_s, self._config.link_backoff_max_s)

    def succeeded(self, transport: str) -> None:
        """Forget its failures."""
        self._failures.pop(transport, None)
        self._again_s.pop(transport, None)

    def rate(self, transport: str) -> LinkRate:
        """What has been measured of it; 0 bytes per second while nothing has."""
        return self._rates.setdefault(transport, LinkRate())

    def order(self, candidates: Sequence[str], now_s: float) -> list[str]:
        """Usable ones, the fastest first and the others as given, then the paused ones, soonest first."""
        paused = [name for name in candidates if self._again_s.get(name, now_s) > now_s]
        usable = [name for name in candidates if name not in paused]
        if self._config.link_choice == "measured" and usable:
            best = self._fastest(usable)
            usable = [best, *(name for name in usable if name != best)]
        return usable + sorted(paused, key=lambda name: self._again_s[name])

    def _fastest(self, usable: Sequence[str]) -> str:
        best = usable[0]
        for name in usable[1:]:
            known, other = self.rate(best).bytes_per_s, self.rate(name).bytes_per_s
            if known and other > _MARGIN * known:
                best = name
        return best
