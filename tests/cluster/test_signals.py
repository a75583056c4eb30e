"""Signals end a block in order, and leave no handler behind."""

from __future__ import annotations

import os
import signal
import time

import pytest

from prismserve.cluster.signals import deadline, deferred, handled, terminate
from prismserve.core.errors import DeadlineExceededError


def test_the_deadline_ends_a_block_that_takes_too_long():
    with pytest.raises(DeadlineExceededError, match="within 0 s"), deadline(0.05):
        time.sleep(5)


def test_a_block_that_ends_in_time_is_left_alone():
    before = signal.getsignal(signal.SIGALRM)
    with deadline(30.0):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) is before


def test_sigterm_becomes_an_orderly_exit_with_the_shells_status():
    before = signal.getsignal(signal.SIGTERM)

    def be_terminated() -> None:
        with handled(signal.SIGTERM, terminate):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(SystemExit) as ended:
        be_terminated()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_deferred_signal_ends_the_process_after_the_block_and_not_within():
    before = signal.getsignal(signal.SIGTERM)
    reached = []

    def block() -> None:
        with deferred(signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            reached.append(True)

    with pytest.raises(SystemExit) as caught:
        block()
    assert reached
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_deferred_is_nothing_raised():
    with deferred(signal.SIGINT):
        pass
