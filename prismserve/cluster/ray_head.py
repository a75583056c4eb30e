"""The head of the Ray cluster (GCS) as the process that started the cluster sees it, above all once it is gone."""

from __future__ import annotations

import socket
import time
from typing import Any, Final

PROBE_TIMEOUT_S: Final = 1.0
LISTEN_PAUSE_S: Final = 0.2


def head_answers(address: str, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Whether something accepts connections at ``host:port``, the head's address. Waits at most ``timeout_s`` seconds."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s):
            return True
    except OSError:
        return False


class PacedSubscriber:
    """A subscriber to the head's messages whose empty answers are at least ``pause_s`` seconds apart.

    Ray's driver listens for errors in a thread that polls again at once after an empty answer. A living head holds each
    poll open until there is something to say; without one each poll returns within a millisecond, and the thread takes
    a whole core from the workers beside it for as long as the head is gone.
    """

    def __init__(self, subscriber: Any, pause_s: float = LISTEN_PAUSE_S) -> None:
        self._subscriber = subscriber
        self._pause_s = pause_s

    def poll(self, *args: Any, **kwargs: Any) -> Any:
        """As the subscriber's own ``poll``, later where it brought nothing."""
        began_s = time.monotonic()
        key, message = self._subscriber.poll(*args, **kwargs)
        if message is None:
            time.sleep(max(0.0, self._pause_s - (time.monotonic() - began_s)))
        return key, message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subscriber, name)


def pace_error_listener() -> None:
    """Let this driver's listener rest between empty polls; call after ``ray.init``. Elsewhere than in a driver nothing happens."""
    from ray._private.worker import global_worker

    subscriber = getattr(global_worker, "gcs_error_subscriber", None)
    if subscriber is not None and not isinstance(subscriber, PacedSubscriber):
        global_worker.gcs_error_subscriber = PacedSubscriber(subscriber)
