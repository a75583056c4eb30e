"""The thread an engine runs in."""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from prismserve.core.errors import DeadlineExceededError, EngineError, OverloadedError, PrismServeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismserve.core.types import TokenOutput
    from prismserve.engine.engine import Engine
    from prismserve.engine.prefix_cache import CacheEvents

T = TypeVar("T")

_log = logging.getLogger(__name__)
_COMMANDS_MAX = 4096
_IDLE_WAIT_S = 1.0
# How soon a stalled engine looks at deadlines again; any call wakes it at once.
_STALL_WAIT_S = 0.02


class _Command:
    """A function to run between steps, and where its result goes."""

    def __init__(self, run: Callable[[], None], fail: Callable[[BaseException], object]) -> None:
        self.run = run
        self.fail = fail


class EngineLoop:
    """Steps an engine while it has work, and runs calls between steps.

    ``on_outputs`` and ``on_cache_events`` are called in the loop's thread and must return at once. When there has been
    nothing to do for a second, the engine's integrity check runs, once.

    Attributes:
        integrity_failures: times the check found the block accounts wrong; each is logged.
    """

    def __init__(
        self,
        engine: Engine,
        on_outputs: Callable[[list[TokenOutput]], None],
        on_cache_events: Callable[[CacheEvents], None],
        *,
        commands_max: int = _COMMANDS_MAX,
    ) -> None:
        """Drive ``engine``; at most ``commands_max`` calls may be queued."""
        self._engine = engine
        self._on_outputs = on_outputs
        self._on_cache_events = on_cache_events
        self._commands: queue.Queue[_Command] = queue.Queue(commands_max)
        self.integrity_failures = 0
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Run ``function(engine)`` between two steps.

        Returns:
            A future with its result or exception.

        Raises:
            OverloadedError: too many calls are queued.
            EngineError: the loop was stopped.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(self._engine)
            except BaseException as error:  # noqa: BLE001 - the caller's exception is the caller's to see
                future.set_exception(error)
            else:
                future.set_result(result)

        if self._stopping.is_set():
            message = "the engine has stopped"
            raise EngineError(message)
        try:
            self._commands.put_nowait(_Command(run, future.set_exception))
        except queue.Full:
            message = f"{self._commands.maxsize} calls are waiting for the engine"
            raise OverloadedError(message) from None
        self._wake.set()
        return future

    def stop(self, timeout_s: float) -> None:
        """End the thread after the current step; DeadlineExceededError if it does not end in time."""
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            message = f"the engine did not stop within {timeout_s:g} s"
            raise DeadlineExceededError(message)
        self._refuse_commands()

    def _run(self) -> None:
        unchecked = False
        while not self._stopping.is_set():
            self._wake.clear()
            self._run_commands()
            if self._engine.has_work:
                self._step()
                if self._engine.stalled:
                    self._wake.wait(_STALL_WAIT_S)
                unchecked = True
            elif not self._wake.wait(_IDLE_WAIT_S) and unchecked:
                self._check()
                unchecked = False
        self._refuse_commands()

    def _run_commands(self) -> None:
        for _ in range(self._commands.qsize()):
            self._commands.get_nowait().run()
        self._publish_events()

    def _refuse_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command.fail(EngineError("the engine has stopped"))

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except Exception as error:  # noqa: BLE001 - the outermost loop: one bad step must not end the worker
            _log.exception("an engine step failed")
            reason = error.message if isinstance(error, PrismServeError) else "internal error in the engine"
            outputs = self._engine.abandon_step(reason)
        if outputs:
            self._deliver(self._on_outputs, outputs)
        self._publish_events()

    def _check(self) -> None:
        """Look for blocks that were lost or given out twice, once after each spell of work."""
        try:
            self._engine.check_integrity()
        except EngineError:
            self.integrity_failures += 1
            _log.exception("the engine's block accounts do not add up")

    def _publish_events(self) -> None:
        events = self._engine.drain_cache_events()
        if events:
            self._deliver(self._on_cache_events, events)

    def _deliver(self, receiver: Callable[[T], None], what: T) -> None:
        try:
            receiver(what)
        except Exception:  # noqa: BLE001 - a receiver's mistake must not end the loop for everyone else
            _log.exception("the receiver of engine events failed")
