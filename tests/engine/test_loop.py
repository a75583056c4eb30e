from __future__ import annotations

import threading
import time

import pytest

from prismserve.core.errors import EngineError, InvalidRequestError, OverloadedError
from prismserve.core.types import FinishReason
from prismserve.engine.loop import EngineLoop

WAIT_S = 30.0


class Receiver:
    """Collects outputs by request and lets the test wait for their end."""

    def __init__(self) -> None:
        self.outputs: dict[str, list] = {}
        self.added: list[bytes] = []
        self._changed = threading.Condition()

    def take(self, outputs) -> None:
        with self._changed:
            for output in outputs:
                self.outputs.setdefault(output.request_id, []).append(output)
            self._changed.notify_all()

    def events(self, events) -> None:
        self.added.extend(events.added)

    def end_of(self, name: str):
        with self._changed:
            done = self._changed.wait_for(
                lambda: name in self.outputs and self.outputs[name][-1].finish_reason is not None, WAIT_S
            )
        assert done
        return self.outputs[name][-1]


@pytest.fixture
def served(workshop):
    engine, receiver = workshop.engine(), Receiver()
    loop = EngineLoop(engine, receiver.take, receiver.events)
    loop.start()
    yield engine, loop, receiver
    loop.stop(WAIT_S)
    assert not loop.alive


def test_requests_are_served_and_events_reported(workshop, served) -> None:
    engine, loop, receiver = served
    request = workshop.request("a", workshop.questions(0)[0], (0,))
    loop.call(lambda e: e.submit(request, worker="local")).result(WAIT_S)
    assert receiver.end_of("a").finish_reason is FinishReason.STOP
    assert loop.call(lambda e: e.cached_keys()).result(WAIT_S) == receiver.added
    assert loop.call(lambda e: e.check_integrity()).result(WAIT_S) is None
    assert engine.pool.used_groups == 0


def test_the_error_of_a_call_reaches_its_caller(workshop, served) -> None:
    _, loop, _ = served
    request = workshop.request("a", "x", max_tokens=400, min_tokens=400)
    loop.call(lambda e: e.submit(request, worker="local")).result(WAIT_S)
    with pytest.raises(InvalidRequestError):
        loop.call(lambda e: e.submit(request, worker="local")).result(WAIT_S)
    assert loop.call(lambda e: e.cancel("a", 0)).result(WAIT_S)


def test_a_step_that_breaks_fails_its_requests_and_the_loop_lives_on(workshop, served, monkeypatch) -> None:
    engine, loop, receiver = served
    run = engine._stepper._runner.run

    def broken(items, layer_done):
        if any(item.sequence.request.request_id == "bad" for item in items):
            raise RuntimeError("arithmetic gone wrong in /secret/path")
        return run(items, layer_done)

    monkeypatch.setattr(engine._stepper._runner, "run", broken)
    loop.call(lambda e: e.submit(workshop.request("bad", "x"), worker="local")).result(WAIT_S)
    end = receiver.end_of("bad")
    assert (end.finish_reason, end.error) == (FinishReason.ERROR, "internal error in the engine")
    loop.call(lambda e: e.submit(workshop.request("good", "x"), worker="local")).result(WAIT_S)
    assert receiver.end_of("good").finish_reason is not FinishReason.ERROR
    assert loop.call(lambda e: e.check_integrity()).result(WAIT_S) is None


def test_an_idle_or_stalled_loop_does_not_spin(workshop, served) -> None:
    engine, loop, _ = served
    request = workshop.request("a", "hello")
    loop.call(lambda e: e.submit(request, worker="prefill")).result(WAIT_S)
    time.sleep(0.3)
    before = time.thread_time(), time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before[1] < 0.2
    assert loop.call(lambda e: e.release_export("a", 0)).result(WAIT_S) is None
    assert engine.pool.used_groups == 0


def test_calls_are_bounded(workshop) -> None:
    loop = EngineLoop(workshop.engine(), lambda outputs: None, lambda events: None, commands_max=2)
    futures = [loop.call(lambda e: e.stats()) for _ in range(2)]
    with pytest.raises(OverloadedError, match="2 calls are waiting"):
        loop.call(lambda e: e.stats())
    loop.stop(1.0)
    for future in futures:
        with pytest.raises(EngineError, match="has stopped"):
            future.result(1.0)


def test_a_stopped_loop_takes_no_calls(served, workshop) -> None:
    loop = EngineLoop(workshop.engine(), lambda outputs: None, lambda events: None)
    loop.start()
    loop.stop(WAIT_S)
    with pytest.raises(EngineError, match="has stopped"):
        loop.call(lambda e: e.stats())


def test_a_receiver_that_fails_does_not_end_the_loop(workshop) -> None:
    def fail(outputs) -> None:
        raise RuntimeError("no")

    loop = EngineLoop(workshop.engine(), fail, fail)
    loop.start()
    loop.call(lambda e: e.submit(workshop.request("a", "x"), worker="local")).result(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while loop.call(lambda e: e.has_work).result(WAIT_S) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loop.alive
    loop.stop(WAIT_S)


def test_lost_blocks_are_found_once_the_engine_is_idle(workshop, monkeypatch, caplog) -> None:
    monkeypatch.setattr("prismserve.engine.loop._IDLE_WAIT_S", 0.02)
    engine = workshop.engine()
    loop = EngineLoop(engine, lambda outputs: None, lambda events: None)
    loop.start()
    loop.call(lambda e: e.submit(workshop.request("a", "x"), worker="local")).result(WAIT_S)
    assert settled(lambda: not engine.has_work)
    time.sleep(0.2)
    assert loop.integrity_failures == 0
    loop.call(lambda e: e.pool.allocate(1)).result(WAIT_S)
    loop.call(lambda e: e.submit(workshop.request("b", "x"), worker="local")).result(WAIT_S)
    assert settled(lambda: loop.integrity_failures == 1)
    assert "do not add up" in caplog.text
    time.sleep(0.1)
    assert loop.integrity_failures == 1, "once after each spell of work"
    loop.stop(WAIT_S)


def settled(condition) -> bool:
    deadline = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()
