"""When a failed attempt is tried again: a pure policy, with clock and randomness passed in."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from prismserve.client.errors import ClientError, RequestError, TimeoutExceededError

_TRANSIENT = (grpc.StatusCode.UNAVAILABLE,)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounded exponential backoff with full jitter.

    Retried is only what is safe: UNAVAILABLE before the first message of an answer, and RESOURCE_EXHAUSTED when the
    server said when to come back. Nothing is retried beyond the call's deadline.

    Attributes:
        attempts_max: attempts in all; 1 never retries.
        backoff_s: upper bound of the first wait, doubled for each further one.
        backoff_max_s: upper bound of every wait that the server did not ask for.
    """

    attempts_max: int = 4
    backoff_s: float = 0.1
    backoff_max_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts_max < 1:
            message = f"attempts_max must be at least 1, got {self.attempts_max}"
            raise RequestError(message, field="attempts_max")
        if not 0 <= self.backoff_s <= self.backoff_max_s:
            message = f"backoff_s must lie between 0 and backoff_max_s, got {self.backoff_s} and {self.backoff_max_s}"
            raise RequestError(message, field="backoff_s")

    def wait_s(self, error: ClientError, attempt: int, *, started: bool, jitter: float) -> float | None:
        """How long to wait before the next attempt, or None to give up.

        Args:
            error: why the attempt failed.
            attempt: number of the failed attempt, from 1.
            started: whether a message of the answer had arrived.
            jitter: uniform in [0, 1).

        Returns:
            Seconds, or None.
        """
        if started or attempt >= self.attempts_max:
            return None
        backoff_s = jitter * min(self.backoff_max_s, self.backoff_s * 2.0 ** (attempt - 1))
        if error.code in _TRANSIENT:
            return max(backoff_s, error.retry_after_s or 0.0)
        if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after_s is not None:
            return error.retry_after_s + backoff_s
        return None


@dataclass(slots=True)
class Attempts:
    """The deadline and the attempts of one call; the caller does the waiting.

    Attributes:
        timeout_s: for the whole call, retries included, in seconds.
    """

    policy: RetryPolicy
    timeout_s: float
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random
    started: bool = False
    _attempt: int = field(default=0, init=False)
    _deadline: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._deadline = self.clock() + self.timeout_s

    def begin(self) -> float:
        """Count an attempt; the seconds it may take. TimeoutExceededError when none are left."""
        left_s = self._deadline - self.clock()
        if left_s <= 0:
            message = f"no attempt was answered within timeout_s={self.timeout_s:g}"
            raise TimeoutExceededError(message, field="timeout_s")
        self._attempt += 1
        return left_s

    def after(self, error: ClientError) -> float:
        """How long to wait before the next attempt, in seconds; raises ``error`` when there is to be none."""
        wait_s = self.policy.wait_s(error, self._attempt, started=self.started, jitter=self.jitter())
        if wait_s is None or self.clock() + wait_s >= self._deadline:
            raise error
        return wait_s
