"""Which link to try next: pure bookkeeping of failures, with the clock passed in."""

from __future__ import annotations

from collections.abc import Sequence

from prismserve.kv_transfer.config import TransferConfig


class LinkHealth:
    """Failures per transport towards one peer.

    A failed transport is passed over for a while that doubles with each failure in a row. It is never ruled out: when
    every transport is passed over, the one whose turn comes first is tried anyway, so that one transient error cannot
    take a healthy pair out of service.
    """

    def __init__(self, config: TransferConfig) -> None:
        self._config = config
        self._failures: dict[str, int] = {}
        self._again_s: dict[str, float] = {}

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

    def order(self, candidates: Sequence[str], now_s: float) -> list[str]:
        """Usable ones in the given order, then the paused ones, soonest first."""
        paused = [name for name in candidates if self._again_s.get(name, now_s) > now_s]
        usable = [name for name in candidates if name not in paused]
        return usable + sorted(paused, key=lambda name: self._again_s[name])
