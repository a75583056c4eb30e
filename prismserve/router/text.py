"""Find stop strings in a stream of text pieces, holding back what may be the start of one."""

from __future__ import annotations


def _held_chars(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of a stop string."""
    longest = min(len(text), max(len(stop) for stop in stops) - 1)
    for length in range(longest, 0, -1):
        end = text[-length:]
        if any(stop.startswith(end) for stop in stops):
            return length
    return 0


class StopMatcher:
    """Cuts a stream of text before the first stop string; the stop string itself is never emitted.

    Attributes:
        hit: whether a stop string was met; nothing may be pushed after that.
    """

    __slots__ = ("_held", "_stops", "hit")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def push(self, text: str, *, armed: bool = True) -> str:
        """Take new text and return what may be shown now.

        Args:
            text: what was generated since the last call.
            armed: False while ``min_tokens`` has not been reached: everything passes.
        """
        pending = self._held + text
        self._held = ""
        if not self._stops or not armed:
            return pending
        found = [at for at in (pending.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.hit = True
            return pending[: min(found)]
        cut = len(pending) - _held_chars(pending, self._stops)
        self._held = pending[cut:]
        return pending[:cut]

    def flush(self) -> str:
        """The end of the stream: text held back for a stop string that did not come."""
        shown, self._held = self._held, ""
        return shown
