from __future__ import annotations

import threading
import time

import pytest
from kv_transfer_conftest import until

from prismserve.core.errors import OverloadedError, TransferError, TransportError
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.transports import _group, nccl

CONFIG = TransferConfig(arena_bytes=1 << 20, transports=("nccl",), write_timeout_s=2.0)


@pytest.fixture
def two():
    arenas = Arena(CONFIG), Arena(CONFIG)
    transports = [nccl.NcclTransport("w", arena, CONFIG) for arena in arenas]
    yield transports
    for transport in transports:
        transport.close()
        transport.close()
    for arena in arenas:
        arena.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-nccl")]


def staged(link, offset_bytes, nbytes):
    deadline_s = time.monotonic() + 10
    while True:
        try:
            return link.stage(offset_bytes, nbytes)
        except OverloadedError:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


@pytest.fixture
def link(two):
    link = two[0].connect(two[1].endpoint())
    yield link
    link.close()
    link.close()
    until(lambda: not link._thread.is_alive())


def test_bytes_are_in_the_peers_memory_before_the_notification_and_staging_is_given_back(two, link):
    for value in (9, 8):
        write = staged(link, 4096, 70000)
        write.buffer.fill_(value)
        handle = write.submit(b"there")
        until(handle.poll)
        assert two[1].poll() == [b"there"]
        assert two[1].arena.memory[4096:74096].eq(value).all()
    assert two[0].arena.used_staging_pages == 0
    until(link.notify(b"alone").poll)
    assert two[1].poll() == [b"alone"]


def test_only_the_registrys_token_lets_a_peer_in_and_only_whole_endpoints_are_tried(two):
    endpoint = dict(two[1].endpoint())
    stranger = two[0].connect({**endpoint, "token": "0" * 32})
    until(lambda: not stranger._thread.is_alive(), 10)
    with pytest.raises(TransportError, match="failed"):
        stranger.stage(0, 1)
    for wrong in ({"token": "x"}, {"port": 0}, {"device": "tpu"}, {"more": 1}):
        with pytest.raises(TransportError, match="malformed"):
            two[0].connect({**endpoint, **wrong})
    assert not two[1].reachable(endpoint)
    assert two[0].reachable(endpoint)


def test_writes_stay_inside_the_landing_pages_at_both_ends(two, link):
    landing = two[1].arena.landing_bytes
    for offset, nbytes in [(-1, 1), (landing, 1), (0, landing + 1)]:
        with pytest.raises(TransportError, match="landing bytes"):
            link.stage(offset, nbytes)
    with pytest.raises(TransferError, match="landing bytes"):
        _group.parse(_group.frame(landing, 1, b"x"), landing)


def test_the_end_of_either_side_ends_the_link_and_frees_its_staging(two, link):
    until(link.notify(b"x").poll)
    two[1].close()
    with pytest.raises(TransportError):
        until(staged(link, 0, 4096).submit(b"n").poll, 10)
    until(lambda: two[0].arena.used_staging_pages == 0)
    with pytest.raises(TransportError):
        link.stage(0, 1)


def test_a_cancelled_write_gives_its_staging_back(two, link):
    handle = staged(link, 0, 4096).submit(b"n")
    handle.cancel()
    assert handle.poll()
    until(lambda: two[0].arena.used_staging_pages == 0)


def test_an_idle_link_stays_open(two, link, monkeypatch):
    monkeypatch.setattr(_group, "SILENCE_S", 1.0)
    monkeypatch.setattr(_group, "KEEP_ALIVE_S", 0.2)
    until(link.notify(b"x").poll)
    time.sleep(2.0)
    until(link.notify(b"y").poll)
    assert two[1].poll() == [b"x", b"y"]
