"""Transfers between two real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kv_transfer_conftest import LAYOUT, Peer, assert_received, expect, manifest_of, push_all, until

from prismserve.core.errors import LeaseExpiredError, TransferError
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.sender import Outgoing

_MARKED_FOR_REMOVAL = "1"


def config(*transports: str, **more) -> TransferConfig:
    return TransferConfig(arena_bytes=8 << 20, transports=transports, notify_timeout_s=1.0, **more)


def shared_memory() -> set[str]:
    """Named segments, and System V segments that would outlive their processes."""
    named = {entry.name for entry in Path("/dev/shm").iterdir()}
    rows = (line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:])
    return named | {row[1] for row in rows if not (len(row[2]) == 4 and row[2].startswith(_MARKED_FOR_REMOVAL))}


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    peer = Peer("b", config("nixl", "shm", "nccl"))
    yield peer
    peer.close()


@pytest.mark.parametrize("transport", ["shm", "nixl", "nccl"])
@pytest.mark.parametrize(("codec", "atol"), [("none", 0.0), ("int8", 0.05), ("int4", 0.5), ("fp8", 0.3)])
def test_kv_arrives_in_another_process_bit_for_bit_or_within_the_codecs_bound(
    transport, codec, atol, make_worker, peer
):
    sender, expected = make_worker("a", config(transport)), expect(codec, tokens=200)
    reservation = peer.call("reserve", expected)
    outgoing = Outgoing(sender.hub, peer.call("info"), reservation, expected.codec, LAYOUT)
    push_all(outgoing, 5, 200)
    payloads = outgoing.finish(10)
    assert outgoing.transport == transport
    assert outgoing.bytes_sent == sum(payload.encoded_bytes for payload in payloads)
    peer.call("commit", reservation.lease_id, reservation.extent.generation, manifest_of(expected, payloads))
    got = {key: tuple(map(torch.from_numpy, pair)) for key, pair in peer.call("got").items()}
    assert_received(got, 5, 200, atol)
    assert peer.call("used") == (0, 0)
    assert sender.arena.used_staging_pages == 0


def test_the_first_transport_in_the_senders_order_that_both_ends_have_is_used(make_worker, peer):
    sender, expected = make_worker("a", config("local", "shm", "nixl")), expect()
    outgoing = Outgoing(sender.hub, peer.call("info"), peer.call("reserve", expected), expected.codec, LAYOUT)
    push_all(outgoing, 0, 100)
    outgoing.finish(10)
    assert outgoing.transport == "shm"


def test_a_cancelled_sender_gives_the_receiver_its_pages_back_at_once(make_worker, peer):
    expected = expect()
    for transport in ("shm", "nixl"):
        before = peer.call("used")
        sender = make_worker("a", config(transport))
        outgoing = Outgoing(sender.hub, peer.call("info"), peer.call("reserve", expected), expected.codec, LAYOUT)
        push_all(outgoing, 0, 50)
        outgoing.cancel()
        until(lambda before=before: peer.call("used") == before)


def test_a_sender_that_was_suspended_past_its_lease_is_refused(make_worker, peer):
    receiver, expected = make_worker("c", config("shm")), expect(tokens=200)
    reservation = receiver.reserve(expected, ttl_s=0.3)
    peer.process.send_signal(signal.SIGSTOP)
    until(lambda: receiver.arena.used_pages == 0)
    second = receiver.reserve(expect(tokens=200, request_id="next"))
    assert second.extent.first_page == reservation.extent.first_page
    os.kill(peer.process.pid, signal.SIGCONT)
    payloads, _ = peer.call("send", receiver.info, reservation, expected.codec, 0, 200, True)
    manifest = manifest_of(expected, payloads)
    with pytest.raises(LeaseExpiredError):
        receiver.receiver.commit(reservation.lease_id, reservation.extent.generation, manifest).result(5)
    until(lambda: receiver.receiver.stats.notifications_duplicate > 0)
    assert receiver.got == {}


def test_the_receivers_death_ends_transfers_and_frees_the_senders_staging(make_worker, make_peer):
    before, receiver, expected = shared_memory(), make_peer("b", config("nixl", "shm")), expect(tokens=200)
    target = receiver.call("info")
    outgoings = []
    for transport in ("shm", "nixl"):
        sender = make_worker("a", config(transport))
        outgoing = Outgoing(sender.hub, target, receiver.call("reserve", expected), expected.codec, LAYOUT)
        push_all(outgoing, 0, 100)
        until(lambda outgoing=outgoing: outgoing.bytes_sent > 0)
        outgoings.append((sender, outgoing))
    receiver.process.send_signal(signal.SIGKILL)
    receiver.process.wait(10)
    for sender, outgoing in outgoings:
        push_all(outgoing, 0, 200)
        with pytest.raises(TransferError):
            outgoing.finish(10)
        until(lambda sender=sender: sender.arena.used_staging_pages == 0)
    assert shared_memory() <= before


def test_the_senders_death_frees_the_receivers_pages_and_leaves_no_memory_or_socket(make_worker, make_peer):
    before, sender, expected = shared_memory(), make_peer("a", config("nixl", "shm", "local")), expect(tokens=200)
    sockets = sender.call("info").endpoint
    receivers = [make_worker("b", config("shm")), make_worker("c", config("nixl"))]
    for receiver in receivers:
        reservation = receiver.reserve(expected, ttl_s=1.0)
        sender.call("send", receiver.info, reservation, expected.codec, 0, 200, False)
    listening = [
        line.split("@")[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@prismserve" in line
    ]
    assert any(name.encode() in sockets for name in listening)
    sender.process.send_signal(signal.SIGKILL)
    sender.process.wait(10)
    for receiver in receivers:
        until(lambda receiver=receiver: receiver.receiver.stats.leases_expired == 1)
        until(lambda receiver=receiver: receiver.arena.used_pages == 0)
    assert shared_memory() <= before
    listening = [
        line.split("@")[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@prismserve" in line
    ]
    assert not any(name.encode() in sockets for name in listening)
