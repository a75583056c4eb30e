"""A worker inside an actor process: its own event loop thread, start, health and orderly end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.core.errors import PrismServeError
from prismserve.core.loop_thread import LoopThread
from prismserve.worker_runtime.runtime import WorkerRuntime

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismserve.worker_runtime.config import WorkerConfig

STOP_TIMEOUT_S = 20.0


class WorkerHost:
    """Owns a runtime and the thread it lives on.

    Args:
        config: the worker's configuration.
        attach: adds the role's job handlers to the loaded runtime; called on the runtime's loop.
        progress: see :class:`WorkerRuntime`.
        start_timeout_s: how long loading and registering may take.
    """

    def __init__(
        self,
        config: WorkerConfig,
        attach: Callable[[WorkerRuntime], None],
        progress: Callable[[str, int, int], None],
        start_timeout_s: float,
    ) -> None:
        self._thread = LoopThread(f"{config.role.value}-runtime")
        self._config = config
        self._attach = attach
        self._stopped = False
        self.runtime = self._thread.run(self._create(progress), 10.0)
        try:
            self._thread.run(self._start(), start_timeout_s)
        except PrismServeError:
            self.stop()
            raise

    async def _create(self, progress: Callable[[str, int, int], None]) -> WorkerRuntime:
        return WorkerRuntime(self._config, progress)

    async def _start(self) -> None:
        await self.runtime.load()
        self._attach(self.runtime)
        await self.runtime.serve()

    def check(self) -> None:
        """Raise EngineError if the worker cannot serve any more."""
        self.runtime.check()

    def stop(self, *, drain: bool = False) -> None:
        """Leave the cluster; with ``drain``, after the running requests have ended or their time is up."""
        if self._stopped:
            return
        self._stopped = True
        if drain:
            self._thread.run(self.runtime.drain(), self._config.drain_timeout_s + 5.0)
        self._thread.run(self.runtime.stop(), STOP_TIMEOUT_S)
        self._thread.close()
