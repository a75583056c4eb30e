"""What the process that started the cluster does about a head that is gone."""

from __future__ import annotations

import socket
import time
from typing import Any

from prismserve.cluster.ray_head import PacedSubscriber, head_answers


class Messages:
    def __init__(self, *answers: tuple[Any, Any]) -> None:
        self._answers = list(answers)
        self.closed = False

    def poll(self, timeout: float | None = None) -> tuple[Any, Any]:
        del timeout
        return self._answers.pop(0) if self._answers else (None, None)

    def close(self) -> None:
        self.closed = True


def polls_within(subscriber: Any, duration_s: float) -> int:
    until_s = time.monotonic() + duration_s
    count = 0
    while time.monotonic() < until_s:
        subscriber.poll()
        count += 1
    return count


def test_empty_answers_are_apart_and_messages_are_not_held_back() -> None:
    assert polls_within(Messages(), 0.25) > 100
    assert polls_within(PacedSubscriber(Messages(), pause_s=0.05), 0.25) <= 5
    paced = PacedSubscriber(Messages((b"key", {"error": 1}), (b"key", {"error": 2})), pause_s=60.0)
    assert paced.poll() == (b"key", {"error": 1})
    assert paced.poll(timeout=1) == (b"key", {"error": 2})


def test_what_else_a_subscriber_can_do_it_still_can() -> None:
    messages = Messages()
    PacedSubscriber(messages).close()
    assert messages.closed


def test_a_head_answers_where_something_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert head_answers(address)
    assert not head_answers(address, timeout_s=0.5)
