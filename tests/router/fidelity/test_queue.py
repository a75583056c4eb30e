"""What waits for a replay is bounded in number, bytes and age."""

from __future__ import annotations

import pytest

from prismserve.router.fidelity.config import FidelityConfig
from prismserve.router.fidelity.queue import ReplayQueue


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def queue(clock=None, draw=lambda: 0.0, **config):
    return ReplayQueue(FidelityConfig(**config), clock or Clock(), draw)


def test_the_share_is_drawn_and_nothing_is_when_it_is_off():
    draws = iter([0.0, 0.0099, 0.01, 0.5])
    subject = queue(draw=lambda: next(draws), share=0.01)
    assert [subject.chosen() for _ in range(4)] == [True, True, False, False]

    def never():
        message = "a share of 0 draws nothing"
        raise AssertionError(message)

    assert not queue(draw=never, share=0.0).chosen()


def test_it_is_first_in_first_out_and_counts_bytes():
    subject = queue(queue_requests=3, queue_bytes=100)
    assert [subject.offer(name, size) for name, size in (("a", 40), ("b", 60), ("c", 1))] == [True, True, False]
    assert subject.status() == {"requests": 2, "bytes": 100}
    assert subject.take().item == "a"
    assert subject.offer("c", 40)
    assert not subject.offer("d", 1)
    assert [subject.take().item for _ in range(2)] == ["b", "c"]
    assert subject.take() is None
    assert subject.nbytes == 0


def test_it_holds_a_bounded_number_of_requests():
    subject = queue(queue_requests=2)
    assert [subject.offer(number, 0) for number in range(4)] == [True, True, False, False]
    assert not queue(queue_requests=0).offer("a", 0)


def test_what_is_too_old_is_given_up_with_its_images():
    clock = Clock()
    subject = queue(clock, queue_age_s=10.0)
    subject.offer("a", 7)
    clock.now_s = 6.0
    subject.offer("b", 5)
    clock.now_s = 10.0
    assert subject.expire() == 1
    assert subject.status() == {"requests": 1, "bytes": 5}
    assert subject.take().item == "b"


@pytest.mark.parametrize(("later_s", "kept"), [(5.0, True), (10.0, False)])
def test_an_interrupted_replay_is_the_next_one_until_its_time_is_over(later_s, kept):
    clock = Clock()
    subject = queue(clock, queue_age_s=10.0)
    subject.offer("a", 3)
    subject.offer("b", 4)
    entry = subject.take()
    clock.now_s = later_s
    assert subject.put_back(entry) == kept
    assert subject.take().item == ("a" if kept else "b")
