"""The hit rate that one infinite cache, shared by all workers without delay, would have had in the same run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prismserve.core.prompt import block_keys, elements

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prismserve.core.types import Request


@dataclass(frozen=True, slots=True)
class Observed:
    """One request of the run, by the monotonic clock in seconds.

    Attributes:
        request: as the router prepared it.
        answer: tokens of the answer.
        cached_tokens: prompt tokens that were not computed, as its report says.
        started_s: when it was asked.
        first_s: when its first token came: its prompt is cached from then on.
        ended_s: when it ended: its answer is cached from then on.
    """

    request: Request
    answer: tuple[int, ...]
    cached_tokens: int
    started_s: float
    first_s: float
    ended_s: float


@dataclass(slots=True)
class InfiniteCache:
    """Keys of all blocks that were ever computed."""

    block_tokens: int
    _held: set[bytes] = field(default_factory=set)

    def add(self, request: Request, answer: tuple[int, ...] = ()) -> None:
        """A prompt was computed, or an answer to it; the last token of an answer never is."""
        slots = elements(request.prompt, answer[:-1])
        self._held.update(block_keys(request.namespace, slots, self.block_tokens))

    def cached(self, request: Request) -> int:
        """Prompt tokens that need not be computed; the last one always is."""
        found = 0
        for key in block_keys(request.namespace, elements(request.prompt), self.block_tokens):
            if key not in self._held:
                break
            found += 1
        return min(found * self.block_tokens, request.prompt.tokens - 1)


def hit_rates(observed: Iterable[Observed], block_tokens: int) -> tuple[float, float]:
    """Share of prompt tokens that were cached: in the run, and in the infinite cache.

    A request finds what others had finished when it was asked.
    """
    requests = list(observed)
    events = [(item.started_s, 2, item) for item in requests]
    events += [(item.first_s, 0, item) for item in requests]
    events += [(item.ended_s, 1, item) for item in requests]
    cache = InfiniteCache(block_tokens)
    ideal = 0
    for _, kind, item in sorted(events, key=lambda event: event[:2]):
        if kind == 0:
            cache.add(item.request)
        elif kind == 1:
            cache.add(item.request, item.answer)
        else:
            ideal += cache.cached(item.request)
    total = sum(item.request.prompt.tokens for item in requests)
    return sum(item.cached_tokens for item in requests) / total, ideal / total
