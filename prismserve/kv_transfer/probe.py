"""Measuring the links to a peer: a few writes into the part of its arena that holds nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from prismserve.core.errors import OverloadedError, PrismServeError
from prismserve.kv_transfer.send_loop import Turn
from prismserve.kv_transfer.transports.base import Link, StagedWrite, WriteHandle
from prismserve.kv_transfer.wire import encode_probe

WRITES: Final = 4
"""Per link; the first warms the link up and is not counted."""
_log = logging.getLogger(__name__)


class Probe:
    """One round over all links to one peer; a :class:`prismserve.kv_transfer.send_loop.Work`.

    Args:
        links: to measure, one after the other.
        area: (offset, bytes) of the peer's arena that may be written to.
        timeout_s: for one link, after which it counts as failed.
        done: called on the send thread with the transport and its best bytes per second, or 0.0 if it failed.
    """

    def __init__(
        self, links: Sequence[Link], area: tuple[int, int], timeout_s: float, done: Callable[[str, float], None]
    ) -> None:
        self._links = list(links)
        self._offset_bytes, self._nbytes = area
        self._timeout_s = timeout_s
        self._done = done
        self._deadline_s = 0.0
        self._written = 0
        self._best = 0.0
        self._started_s = 0.0
        self._handle: WriteHandle | None = None

    def advance(self) -> Turn:
        """Start a write or look after the one that has started."""
        if not self._links:
            return Turn.OVER
        link, now_s = self._links[0], time.monotonic()
        if not self._deadline_s:
            self._deadline_s = now_s + self._timeout_s
        try:
            if now_s >= self._deadline_s:
                self._next(link, 0.0)
            elif self._handle is None:
                self._start(link)
            elif self._handle.poll():
                self._finish(link)
            else:
                return Turn.WAITING
        except OverloadedError:
            return Turn.WAITING
        except PrismServeError as error:
            _log.info("a link over %s could not be measured: %s", link.transport, error)
            self._next(link, 0.0)
        return Turn.WORKED

    def _start(self, link: Link) -> None:
        # Counted from before the memory is filled: over some transports filling it is the transfer.
        started_s = time.perf_counter()
        staged: StagedWrite = link.stage(self._offset_bytes, self._nbytes)
        staged.buffer.zero_()
        self._started_s = started_s
        self._handle = staged.submit(encode_probe())

    def _finish(self, link: Link) -> None:
        seconds = max(time.perf_counter() - self._started_s, 1e-9)
        self._handle = None
        self._written += 1
        if self._written > 1:
            self._best = max(self._best, self._nbytes / seconds)
        if self._written == WRITES:
            self._next(link, self._best)

    def _next(self, link: Link, bytes_per_s: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle, self._written, self._best, self._deadline_s = None, 0, 0.0, 0.0
        self._links.pop(0)
        self._done(link.transport, bytes_per_s)

    def fail(self, error: BaseException) -> None:
        """The send loop ends."""
        _log.debug("a probe ended: %s", error)
        if self._handle is not None:
            self._handle.cancel()
        self._links.clear()
