"""An asyncio service on a thread of its own, inside a process whose main loop belongs to somebody else."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from prismserve.core.errors import DeadlineExceededError

T = TypeVar("T")


class Service(Protocol):
    """Something that is started and stopped on one event loop."""

    async def start(self) -> None:
        """Begin; return when ready."""
        ...

    async def stop(self) -> None:
        """End; return when everything is released."""
        ...


class LoopThread:
    """Runs one event loop on a daemon thread.

    Args:
        name: the thread's name.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    @property
    def alive(self) -> bool:
        """Whether the loop's thread runs."""
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run a coroutine on the loop and wait for it; DeadlineExceededError after ``timeout_s``."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise
            future.cancel()
            message = f"{self._thread.name}: no answer within {timeout_s:g} s"
            raise DeadlineExceededError(message) from None

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop the loop and join the thread."""
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self.loop.close()
