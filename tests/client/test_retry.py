from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismserve.client import ClientError, RequestError, RetryPolicy, TimeoutExceededError
from prismserve.client.retry import Attempts

POLICY = RetryPolicy(attempts_max=4, backoff_s=0.1, backoff_max_s=0.3)


def error(code: grpc.StatusCode | None, retry_after_s: float | None = None) -> ClientError:
    return ClientError("no", code=code, retry_after_s=retry_after_s)


@given(code=st.sampled_from([*grpc.StatusCode, None]), after_s=st.none() | st.floats(0, 9), started=st.booleans())
def test_only_what_is_safe_is_retried(code, after_s, started) -> None:
    wait_s = POLICY.wait_s(error(code, after_s), 1, started=started, jitter=0.5)
    unavailable = code is grpc.StatusCode.UNAVAILABLE
    told_when = code is grpc.StatusCode.RESOURCE_EXHAUSTED and after_s is not None
    assert (wait_s is not None) == (not started and (unavailable or told_when))
    if wait_s is not None:
        assert wait_s >= (after_s or 0.0)


def test_waits_double_up_to_their_bound_and_end_with_the_attempts() -> None:
    unavailable = error(grpc.StatusCode.UNAVAILABLE)
    waits = [POLICY.wait_s(unavailable, attempt, started=False, jitter=1.0) for attempt in (1, 2, 3, 4)]
    assert waits == [0.1, 0.2, 0.3, None]


def test_jitter_scales_the_whole_wait() -> None:
    assert POLICY.wait_s(error(grpc.StatusCode.UNAVAILABLE), 2, started=False, jitter=0.0) == 0.0


def test_an_attempt_gets_only_the_time_that_is_left_and_none_starts_after_the_deadline() -> None:
    now_s = [100.0]
    attempts = Attempts(POLICY, 5.0, clock=lambda: now_s[0], jitter=lambda: 1.0)
    assert attempts.begin() == 5.0
    now_s[0] = 104.0
    assert attempts.begin() == pytest.approx(1.0)
    now_s[0] = 105.0
    with pytest.raises(TimeoutExceededError, match="timeout_s=5"):
        attempts.begin()


def test_no_wait_is_begun_that_would_pass_the_deadline() -> None:
    attempts = Attempts(POLICY, 5.0, clock=lambda: 0.0, jitter=lambda: 0.0)
    attempts.begin()
    overloaded = error(grpc.StatusCode.RESOURCE_EXHAUSTED, 5.0)
    with pytest.raises(ClientError) as caught:
        attempts.after(overloaded)
    assert caught.value is overloaded


@pytest.mark.parametrize("values", [{"attempts_max": 0}, {"backoff_s": -1.0}, {"backoff_s": 3.0}])
def test_a_policy_without_sense_is_refused(values) -> None:
    with pytest.raises(RequestError):
        RetryPolicy(**values)
