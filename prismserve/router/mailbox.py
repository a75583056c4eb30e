"""Where the outputs of one attempt arrive: bounded, merging, closed by its owner."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from prismserve.core.types import TokenOutput


@dataclass(frozen=True, slots=True)
class WorkerOutput:
    """Tokens, an end or an error from one worker."""

    worker_id: str
    output: TokenOutput


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The session to a worker ended; whatever it was doing for the request is gone."""

    worker_id: str


Event: TypeAlias = WorkerOutput | WorkerLost


class Mailbox:
    """Events of one (request, attempt) from all the workers that serve it.

    A slow reader costs memory for tokens only: consecutive tokens of one worker are merged into one event, and a
    worker that sends more than ``tokens_max`` is cut off.

    Args:
        request_id: with ``attempt``, the address of this box.
        tokens_max: tokens this attempt may produce.
    """

    def __init__(self, request_id: str, attempt: int, tokens_max: int) -> None:
        self.request_id = request_id
        self.attempt = attempt
        self._room = tokens_max
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> bool:
        """Add an event; False if the worker has sent more tokens than were asked for (the event is dropped)."""
        if isinstance(event, WorkerOutput):
            self._room -= len(event.output.token_ids)
            if self._room < 0:
                return False
            if self._events and self._merge(event):
                return True
        self._events.append(event)
        self._arrived.set()
        return True

    async def get(self, timeout_s: float) -> Event:
        """The next event; TimeoutError when none came in time."""
        if not self._events:
            self._arrived.clear()
            async with asyncio.timeout(timeout_s):
                await self._arrived.wait()
        return self._events.popleft()

    def _merge(self, event: WorkerOutput) -> bool:
        last = self._events[-1]
        if (
            not isinstance(last, WorkerOutput)
            or last.worker_id != event.worker_id
            or last.output.finish_reason is not None
        ):
            return False
        merged = dataclasses.replace(
            event.output,
            token_ids=last.output.token_ids + event.output.token_ids,
            report=event.output.report or last.output.report,
            logprobs=last.output.logprobs + event.output.logprobs,
        )
        self._events[-1] = WorkerOutput(event.worker_id, merged)
        return True
