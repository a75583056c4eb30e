from __future__ import annotations

import time

from kv_transfer_conftest import expect, until

from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.receiver import Receiver
from prismserve.kv_transfer.transports import local

LOOKS = 200


def looks_and_pauses(make_worker, monkeypatch, work_s: float) -> tuple[int, int]:
    """How often a transport that cannot wake anybody is looked at, and how often the receiver slept meanwhile."""
    looks, pauses = [], []
    wait = Receiver._wait

    def look(self) -> list[bytes]:
        if pauses and len(looks) < LOOKS:
            looks.append(len(pauses))
            until_s = time.thread_time() + work_s
            while time.thread_time() < until_s:
                pass
        return []

    def counted(self, pause_s: float) -> bool:
        pauses.append(pause_s)
        return wait(self, pause_s)

    monkeypatch.setattr(local.LocalTransport, "fileno", lambda self: None)
    monkeypatch.setattr(local.LocalTransport, "poll", look)
    monkeypatch.setattr(Receiver, "_wait", counted)
    config = TransferConfig(arena_bytes=8 << 20, transports=("local",), receive_spin_s=0.0005)
    worker = make_worker("b", config)
    worker.reserve(expect())
    until(lambda: len(looks) == LOOKS)
    return len(looks), looks[-1] - looks[0]


def test_a_write_that_needs_this_sides_help_gets_it_without_pause(make_worker, monkeypatch):
    looks, pauses = looks_and_pauses(make_worker, monkeypatch, work_s=0.0002)
    assert pauses < looks / 4


def test_looks_that_move_nothing_are_apart(make_worker, monkeypatch):
    looks, pauses = looks_and_pauses(make_worker, monkeypatch, work_s=0.0)
    # Not one for each: a look that met a collection of garbage, say, counts as one that moved something.
    assert pauses > looks / 10
