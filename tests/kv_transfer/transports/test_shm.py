from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

import pytest

from prismserve.core.errors import TransportError
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.transports import shm

CONFIG = TransferConfig(arena_bytes=1 << 20, transports=("shm",), write_timeout_s=0.1)


@pytest.fixture
def link(transport):
    link = transport.connect(transport.endpoint())
    yield link
    link.close()


@pytest.fixture
def transport():
    arena = Arena(CONFIG)
    transport = shm.ShmTransport("w", arena, CONFIG)
    yield transport
    transport.close()
    arena.close()


def test_bytes_are_written_into_the_peers_memory_before_the_notification(transport, link):
    staged = link.stage(4096, 16)
    staged.buffer.fill_(9)
    assert staged.submit(b"there").poll()
    assert transport.poll() == [b"there"]
    assert transport._arena.memory[4096:4112].tolist() == [9] * 16


def test_only_peers_of_the_same_node_namespaces_and_user_are_reachable(transport):
    endpoint = transport.endpoint()
    assert transport.reachable(endpoint)
    for field in ("boot_id", "hostname", "pid_namespace", "network_namespace"):
        other = {**endpoint, "node": {**endpoint["node"], field: "elsewhere"}}
        assert not transport.reachable(other)
        with pytest.raises(TransportError, match="not on this node"):
            transport.connect(other)
    assert not transport.reachable({**endpoint, "node": {**endpoint["node"], "uid": 12345}})


@pytest.mark.parametrize("change", [{"socket": "../../tmp/x"}, {"socket": "/run/x.sock"}, {"arena": {}}, {"more": 1}])
def test_malformed_endpoints_are_refused(transport, change):
    with pytest.raises(TransportError, match="malformed"):
        transport.connect({**transport.endpoint(), **change})


def test_a_gone_peer_is_a_transport_error(transport):
    with pytest.raises(TransportError, match="gone"):
        transport.connect({**transport.endpoint(), "socket": f"prismserve-{'0' * 32}"})


def send(link, notification):
    handle = link.notify(notification)
    while not handle.poll():
        pass


def test_a_peer_that_does_not_read_ends_the_write_at_its_deadline(link):
    queue_length = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    for _ in range(queue_length):
        send(link, b"x")
    with pytest.raises(TransportError, match="does not take notifications"):
        list(map(partial(send, link), [b"x"] * 8))


def test_datagrams_longer_than_a_notification_or_without_credentials_of_this_user_are_dropped(transport, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.connect(f"\0{transport.endpoint()['socket']}")
        stranger.send(bytes(5000))
        stranger.send(b"fine")
        assert transport.poll() == [b"fine"]
        stranger.send(b"foreign")
        monkeypatch.setattr(shm, "_sender_uid", lambda ancillary: 12345)
        assert transport.poll() == []


def test_a_closed_link_says_so_and_a_closed_transport_has_nothing_to_report(transport, link):
    link.close()
    with pytest.raises(TransportError, match="closed"):
        link.stage(0, 1)
    with pytest.raises(TransportError):
        link.notify(b"x").poll()
    transport.close()
    assert transport.poll() == []
    assert transport.fileno() is None
