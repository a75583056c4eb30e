"""Counters of one engine."""

from __future__ import annotations

from dataclasses import dataclass

_DECAY = 0.9


@dataclass(slots=True)
class MovingAverage:
    """An exponentially weighted mean; the first value counts fully."""

    value: float = 0.0
    seen: bool = False

    def add(self, value: float) -> None:
        """Take in one value."""
        self.value = _DECAY * self.value + (1 - _DECAY) * value if self.seen else value
        self.seen = True


@dataclass(slots=True)
class Counters:
    """Totals since start; ``preemptions`` include the ``swaps`` to host memory."""

    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    image_queries: int = 0
    image_hits: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
