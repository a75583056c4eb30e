"""Requests that wait to be replayed: bounded in number, bytes and age."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismserve.router.fidelity.config import FidelityConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One request; ``nbytes`` is what its images and videos take, ``deadline_s`` when it is given up."""

    item: T
    nbytes: int
    deadline_s: float


class ReplayQueue(Generic[T]):
    """First in, first out; what does not fit or is too old is left out, and counted by who asks.

    Args:
        config: share and bounds.
        clock: seconds, monotonic.
        draw: a random number from 0 to below 1.
    """

    def __init__(self, config: FidelityConfig, clock: Callable[[], float], draw: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._draw = draw
        self._entries: deque[Entry[T]] = deque()
        self.nbytes = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._entries)

    def chosen(self) -> bool:
        """Whether the next compressed request belongs to the share; never when that is 0."""
        return self._config.share > 0 and self._draw() < self._config.share

    def offer(self, item: T, nbytes: int) -> bool:
        """Queue a request; False if there is no room."""
        full = len(self._entries) >= self._config.queue_requests
        if full or self.nbytes + nbytes > self._config.queue_bytes:
            return False
        self._put(Entry(item, nbytes, self._clock() + self._config.queue_age_s), last=True)
        return True

    def take(self) -> Entry[T] | None:
        """The next request; None if none waits."""
        if not self._entries:
            return None
        entry = self._entries.popleft()
        self.nbytes -= entry.nbytes
        return entry

    def put_back(self, entry: Entry[T]) -> bool:
        """Queue a request whose replay was interrupted before all others; False if it is too old or there is no room."""
        if self._clock() >= entry.deadline_s or len(self._entries) >= self._config.queue_requests:
            return False
        self._put(entry, last=False)
        return True

    def expire(self) -> int:
        """Give up what is too old; returns how many were."""
        before = len(self._entries)
        now = self._clock()
        kept = [entry for entry in self._entries if entry.deadline_s > now]
        self._entries = deque(kept)
        self.nbytes = sum(entry.nbytes for entry in kept)
        return before - len(kept)

    def status(self) -> dict[str, Any]:
        """For the status document."""
        return {"requests": len(self._entries), "bytes": self.nbytes}

    def _put(self, entry: Entry[T], *, last: bool) -> None:
        if last:
            self._entries.append(entry)
        else:
            self._entries.appendleft(entry)
        self.nbytes += entry.nbytes
