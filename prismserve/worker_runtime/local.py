"""Jobs done entirely here: prefill and decode in this worker's engine."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prismserve.engine.engine import Engine
    from prismserve.worker_runtime.jobs import Submission
    from prismserve.worker_runtime.runtime import WorkerRuntime
    from prismserve.worker_runtime.sessions import RequestRef


class LocalJobs:
    """Runs a request in the local engine; its outputs go straight to the session.

    Args:
        runtime: the worker.
    """

    def __init__(self, runtime: WorkerRuntime) -> None:
        self._runtime = runtime
        self._cancelled: deque[RequestRef] = deque()
        self._cancelling: asyncio.Task[None] | None = None

    async def submit(self, submission: Submission) -> None:
        """Fetch what peers hold, then hand the request to the engine."""
        fetched = await self._runtime.exchange.fetch(submission, "local")
        request = submission.request
        matcher = await self._runtime.matcher(request)
        self._runtime.fetched[submission.ref] = fetched
        try:
            await self._runtime.on_engine(lambda engine: engine.submit(request, worker="local", matcher=matcher))
        except BaseException:
            self._runtime.fetched.pop(submission.ref, None)
            raise

    async def cancel(self, ref: RequestRef) -> None:
        """Drop it from the engine, whatever job it belongs to.

        A crowd that leaves at once shares one call of the engine.
        """
        self._runtime.fetched.pop(ref, None)
        self._cancelled.append(ref)
        if self._cancelling is None or self._cancelling.done():
            self._cancelling = asyncio.create_task(self._cancel_all(), name="cancel")
        await asyncio.shield(self._cancelling)

    async def _cancel_all(self) -> None:
        while self._cancelled:
            await self._runtime.on_engine(self._drop)

    def _drop(self, engine: Engine) -> None:
        while self._cancelled:
            engine.cancel(*self._cancelled.popleft())
