"""Sender and receiver in one process, where every order of events can be arranged."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from kv_transfer_conftest import LAYOUT, Worker, assert_received, expect, kv, manifest_of, push_all, until

from prismserve.core.errors import (
    ChecksumMismatchError,
    DeadlineExceededError,
    IncompatibleLayoutError,
    LeaseExpiredError,
    OverloadedError,
    RequestCancelledError,
    TransferError,
    TransportError,
)
from prismserve.core.types import Payload
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.manifest import build
from prismserve.kv_transfer.sender import Outgoing
from prismserve.kv_transfer.transports.local import LocalLink, LocalTransport
from prismserve.kv_transfer.wire import checksum, encode_end, encode_payloads


@pytest.fixture
def pair(make_worker) -> tuple[Worker, Worker]:
    return make_worker("a"), make_worker("b")


def start(pair, expected, ttl_s=None):
    reservation = pair[1].reserve(expected, ttl_s)
    return reservation, Outgoing(pair[0].hub, pair[1].info, reservation, expected.codec, LAYOUT)


def commit(pair, reservation, expected, payloads):
    return pair[1].receiver.commit(reservation.lease_id, reservation.extent.generation, manifest_of(expected, payloads))


def test_streamed_chunks_arrive_verified_before_the_commit(pair):
    expected = expect()
    reservation, outgoing = start(pair, expected)
    push_all(outgoing, 1, 100)
    payloads = outgoing.finish(5)
    until(lambda: pair[1].receiver.stats.payloads == len(payloads))
    commit(pair, reservation, expected, payloads).result(5)
    assert_received(pair[1].got, 1, 100, 0.0)
    assert pair[1].arena.used_pages == 0


def test_tokens_the_receiver_already_has_are_not_sent(pair):
    expected = expect(cached_tokens=48)
    reservation, outgoing = start(pair, expected)
    push_all(outgoing, 1, 100)
    commit(pair, reservation, expected, outgoing.finish(5)).result(5)
    assert min(first for _, first in pair[1].got) == 48
    assert_received(pair[1].got, 1, 100, 0.0, cached=48)


def test_a_transfer_of_nothing_completes(pair):
    expected = expect(cached_tokens=100)
    reservation, outgoing = start(pair, expected)
    push_all(outgoing, 1, 100)
    commit(pair, reservation, expected, outgoing.finish(5)).result(5)
    assert pair[1].got == {}


def test_an_embedding_travels_as_raw_bytes(pair):
    embedding = torch.randn(49, 32)
    landed = torch.zeros_like(embedding).view(torch.uint8).reshape(-1)

    def raw_sink(start_token, tokens, data):
        assert data.numel() == tokens * 128
        landed[start_token * 128 : start_token * 128 + data.numel()] = data

    expected = expect(tokens=49)
    reservation = pair[1].receiver.reserve(expected, embedding.nbytes, raw_sink=raw_sink)
    outgoing = Outgoing(pair[0].hub, pair[1].info, reservation, expected.codec, LAYOUT)
    outgoing.push_bytes(0, embedding)
    manifest = build(expected, LAYOUT, outgoing.finish(5), layer_tokens=(), next_position=0)
    assert manifest.raw_bytes == embedding.nbytes
    pair[1].receiver.commit(reservation.lease_id, reservation.extent.generation, manifest).result(5)
    assert torch.equal(landed.view(torch.float32).view(49, 32), embedding)


@pytest.mark.parametrize("fault", ["drop", "duplicate", "reorder"])
def test_lost_repeated_and_shuffled_notifications_change_nothing(pair, monkeypatch, fault):
    poll = LocalTransport.poll

    def faulty(self):
        arrived = poll(self)
        if fault == "drop":
            return [raw for index, raw in enumerate(arrived) if index % 2]
        if fault == "duplicate":
            return [raw for raw in arrived for _ in range(3)]
        return random.sample(arrived, len(arrived))

    monkeypatch.setattr(LocalTransport, "poll", faulty)
    expected = expect()
    reservation, outgoing = start(pair, expected)
    push_all(outgoing, 2, 100)
    commit(pair, reservation, expected, outgoing.finish(5)).result(5)
    assert_received(pair[1].got, 2, 100, 0.0)
    assert pair[1].receiver.stats.checksum_failures == 0


def test_a_flipped_bit_is_found_before_the_bytes_are_used(pair, monkeypatch):
    expected = expect()
    reservation, outgoing = start(pair, expected)
    poll, hold = LocalTransport.poll, threading.Event()
    monkeypatch.setattr(LocalTransport, "poll", lambda self: poll(self) if hold.is_set() else [])
    push_all(outgoing, 3, 100)
    payloads = outgoing.finish(5)
    damaged = payloads[4]
    pair[1].arena.view(reservation.extent, damaged.offset_bytes + 9, 1).bitwise_xor_(4)
    hold.set()
    with pytest.raises(ChecksumMismatchError, match=f"layer {damaged.layer}"):
        commit(pair, reservation, expected, payloads).result(5)
    assert (damaged.layer, damaged.start_token) not in pair[1].got
    assert pair[1].receiver.stats.checksum_failures > 0
    assert pair[1].arena.used_pages == 0


def test_a_payload_that_never_arrives_ends_the_commit_at_its_deadline(pair, monkeypatch):
    monkeypatch.setattr(LocalTransport, "poll", lambda self: [])
    expected = expect()
    reservation, outgoing = start(pair, expected)
    push_all(outgoing, 3, 100)
    payloads = outgoing.finish(5)
    pair[1].arena.view(reservation.extent, payloads[0].offset_bytes, 4).zero_()
    with pytest.raises(DeadlineExceededError):
        commit(pair, reservation, expected, payloads).result(5)
    assert pair[1].arena.used_pages == 0


def test_forged_notifications_are_dropped_and_counted(pair):
    expected = expect()
    reservation = pair[1].reserve(expected)
    link = pair[0].hub.connect(pair[1].info)
    lease, generation = reservation.lease_id, reservation.extent.generation
    piece = Payload(0, 0, 100, 0, 100 * LAYOUT.token_layer_bytes, bytes(16))
    forged = [
        b"",
        b"\x80\x04\x95pickle",
        encode_end(lease, generation + 1),
        encode_end(lease ^ 1, generation),
        encode_payloads(lease, generation + 1, [piece]),
        encode_payloads(lease, generation, [Payload(99, 0, 1, 0, LAYOUT.token_layer_bytes, bytes(16))]),
        encode_payloads(lease, generation, [Payload(0, 100, 1, 0, LAYOUT.token_layer_bytes, bytes(16))]),
        encode_payloads(lease, generation, [Payload(0, 0, 1, 1 << 40, LAYOUT.token_layer_bytes, bytes(16))]),
        encode_payloads(lease, generation, [Payload(0, 0, 1, 0, 7, bytes(16))]),
    ]
    for raw in forged:
        link.notify(raw)
    until(lambda: pair[1].receiver.stats.notifications_refused == len(forged))
    assert pair[1].got == {}
    assert pair[1].receiver.stats.leases_open == 1


def test_pieces_that_the_manifest_does_not_state_end_the_transfer(pair):
    expected = expect()
    reservation, outgoing = start(pair, expected)
    push_all(outgoing, 1, 100)
    payloads = outgoing.finish(5)
    link = pair[0].hub.connect(pair[1].info)
    nbytes = LAYOUT.token_layer_bytes
    data = pair[1].arena.view(reservation.extent, 0, nbytes)
    extra = Payload(0, 1, 1, 0, nbytes, checksum(data.numpy()))
    link.notify(encode_payloads(reservation.lease_id, reservation.extent.generation, [extra]))
    until(lambda: (0, 1) in pair[1].got)
    with pytest.raises(ChecksumMismatchError):
        commit(pair, reservation, expected, payloads).result(5)


def test_a_late_writer_after_a_cancel_is_refused_and_harms_nobody(pair):
    first, second = expect(request_id="first"), expect(request_id="second")
    old = pair[1].reserve(first, ttl_s=0.2)
    link = pair[0].hub.connect(pair[1].info)
    nbytes = LAYOUT.token_layer_bytes * 40
    late = link.stage(old.extent.first_page * old.page_bytes, nbytes)
    pair[1].receiver.cancel(old.lease_id)
    assert pair[1].arena.used_pages == old.extent.pages, "quarantined: the sender may still be writing"
    until(lambda: pair[1].arena.used_pages == 0)
    new, outgoing = start(pair, second)
    assert new.extent.first_page == old.extent.first_page
    push_all(outgoing, 6, 100)
    payloads = outgoing.finish(5)
    until(lambda: pair[1].receiver.stats.payloads == len(payloads))
    late.buffer.fill_(255)
    piece = Payload(0, 0, 40, 0, nbytes, checksum(late.buffer.numpy()))
    late.submit(encode_payloads(old.lease_id, old.extent.generation, [piece]))
    commit(pair, new, second, payloads).result(5)
    assert_received(pair[1].got, 6, 100, 0.0)
    assert pair[1].receiver.stats.notifications_duplicate == 1


def test_a_late_write_over_bytes_not_yet_verified_is_detected(pair, monkeypatch):
    second = expect(request_id="second")
    new, outgoing = start(pair, second)
    link = pair[0].hub.connect(pair[1].info)
    late = link.stage(new.extent.first_page * new.page_bytes, 1000)
    monkeypatch.setattr(LocalTransport, "poll", lambda self: [])
    push_all(outgoing, 6, 100)
    payloads = outgoing.finish(5)
    late.buffer.fill_(255)
    with pytest.raises((ChecksumMismatchError, DeadlineExceededError)):
        commit(pair, new, second, payloads).result(5)
    assert (0, 0) not in pair[1].got


def test_after_a_cancel_returns_the_sink_is_not_called_again(pair):
    entered, release, calls = threading.Event(), threading.Event(), []

    def slow_sink(layer, start_token, keys, values):
        calls.append(layer)
        entered.set()
        release.wait(5)

    expected = expect()
    reservation = pair[1].receiver.reserve(expected, 1 << 20, slow_sink)
    outgoing = Outgoing(pair[0].hub, pair[1].info, reservation, expected.codec, LAYOUT)
    push_all(outgoing, 0, 100)
    assert entered.wait(5)
    cancel = threading.Thread(target=pair[1].receiver.cancel, args=(reservation.lease_id,))
    cancel.start()
    cancel.join(0.1)
    assert cancel.is_alive(), "cancel waits for the call under way"
    release.set()
    cancel.join(5)
    count = len(calls)
    outgoing.finish(5)
    until(lambda: pair[1].receiver.stats.notifications_duplicate > 0)
    assert len(calls) == count == 1


def test_what_a_sink_raises_ends_the_transfer_and_not_the_receiver(pair):
    def full(layer, start_token, keys, values):
        raise OverloadedError("no blocks")

    expected = expect()
    reservation = pair[1].receiver.reserve(expected, 1 << 20, full)
    outgoing = Outgoing(pair[0].hub, pair[1].info, reservation, expected.codec, LAYOUT)
    push_all(outgoing, 0, 100)
    payloads = outgoing.finish(5)
    until(lambda: pair[1].receiver.stats.failures == 1)
    with pytest.raises(OverloadedError, match="no blocks"):
        commit(pair, reservation, expected, payloads).result(5)
    again, outgoing = start(pair, expected)
    push_all(outgoing, 0, 100)
    commit(pair, again, expected, outgoing.finish(5)).result(5)


def test_a_cancelled_transfer_fails_and_tells_the_receiver(pair):
    expected = expect()
    reservation, outgoing = start(pair, expected)
    push_all(outgoing, 0, 100)
    outgoing.cancel()
    with pytest.raises(RequestCancelledError):
        outgoing.finish(5)
    until(lambda: pair[1].arena.used_pages == 0)
    assert reservation.ttl_s == 30.0


def test_a_transient_transport_error_is_retried_and_the_pair_stays_in_service(pair, monkeypatch):
    stage, failures = LocalLink.stage, iter([True, False, True])

    def flaky(self, offset_bytes, nbytes):
        if next(failures, False):
            raise TransportError("the wire hiccuped")
        return stage(self, offset_bytes, nbytes)

    monkeypatch.setattr(LocalLink, "stage", flaky)
    expected = expect()
    reservation, outgoing = start(pair, expected)
    push_all(outgoing, 4, 100)
    commit(pair, reservation, expected, outgoing.finish(5)).result(5)
    assert_received(pair[1].got, 4, 100, 0.0)


def test_a_link_that_always_fails_ends_the_transfer_after_the_configured_attempts(pair, monkeypatch):
    def broken(self, offset_bytes, nbytes):
        raise TransportError("no wire")

    monkeypatch.setattr(LocalLink, "stage", broken)
    _, outgoing = start(pair, expect())
    push_all(outgoing, 4, 100)
    with pytest.raises(TransportError, match="no wire"):
        outgoing.finish(5)
    assert outgoing.error is not None
    until(lambda: pair[1].arena.used_pages == 0)


def test_a_reservation_too_small_ends_the_transfer_without_writing_beyond_it(pair):
    expected = expect()
    reservation = pair[1].receiver.reserve(expected, 1, pair[1].sink)
    outgoing = Outgoing(pair[0].hub, pair[1].info, reservation, expected.codec, LAYOUT)
    push_all(outgoing, 0, 400)
    with pytest.raises(TransferError, match="too small"):
        outgoing.finish(5)


@pytest.mark.parametrize("raised", [RuntimeError, KeyError, OSError])
def test_kv_that_cannot_be_read_ends_its_transfer_alone_and_holds_no_staging(make_worker, raised):
    config = TransferConfig(arena_bytes=8 << 20, transports=("nixl",))
    pair = make_worker("a", config), make_worker("b", config)

    def read(layer, start_token, tokens, *, rows):
        raise raised("gone")

    _, outgoing = start(pair, expect())
    outgoing.push_from(0, 0, 100, read)
    with pytest.raises((TransferError, raised)):
        outgoing.finish(5)
    assert pair[0].arena.used_staging_pages == 0
    reservation, outgoing = start(pair, expect())
    push_all(outgoing, 0, 100)
    commit(pair, reservation, expect(), outgoing.finish(5)).result(5)


def test_a_full_queue_ends_the_transfer_and_not_the_caller(make_worker):
    config = TransferConfig(arena_bytes=8 << 20, transports=("local",), pieces_queued_max=4)
    pair = make_worker("a", config), make_worker("b", config)
    _, outgoing = start(pair, expect())
    blocked = threading.Event()
    keys, values = kv(0, 100)

    def read(layer, start_token, tokens, *, rows):
        blocked.wait(5)
        return keys[0], values[0]

    for _ in range(10):
        outgoing.push_from(0, 0, 100, read)
    assert isinstance(outgoing.error, OverloadedError)
    blocked.set()


def test_the_senders_own_clock_ends_its_writing_when_the_lease_is_over(pair):
    expected = expect()
    reservation, outgoing = start(pair, expected, ttl_s=0.05)
    until(lambda: outgoing.error is not None)
    with pytest.raises(LeaseExpiredError):
        outgoing.finish(5)
    until(lambda: pair[1].arena.used_pages == 0)
    with pytest.raises(LeaseExpiredError):
        commit(pair, reservation, expected, ()).result(5)


def test_a_manifest_of_another_codec_is_refused_and_frees_the_pages(pair):
    expected, other = expect("none"), expect("int8")
    reservation, outgoing = start(pair, expected)
    push_all(outgoing, 0, 100)
    with pytest.raises(IncompatibleLayoutError, match="worker a encoded with"):
        commit(pair, reservation, other, outgoing.finish(5)).result(5)
    assert pair[1].arena.used_pages == 0


def test_a_full_arena_and_a_full_table_say_overloaded(make_worker):
    worker = make_worker("a", TransferConfig(arena_bytes=8 << 20, transports=("local",), leases_max=2))
    worker.receiver.reserve(expect(), 4 << 20, worker.sink)
    with pytest.raises(OverloadedError):
        worker.receiver.reserve(expect(), 4 << 20, worker.sink)
    worker.reserve(expect())
    with pytest.raises(OverloadedError):
        worker.reserve(expect())
    with pytest.raises(TransferError, match="arena_bytes"):
        make_worker("b").receiver.reserve(expect(), 64 << 20, worker.sink)


def test_closing_ends_leases_threads_and_transfers(make_worker):
    pair = make_worker("a"), make_worker("b")
    expected = expect()
    _, outgoing = start(pair, expected)
    pair[0].close()
    with pytest.raises(TransferError):
        outgoing.finish(5)
    pair[1].close()
    with pytest.raises(TransferError):
        pair[1].receiver.reserve(expected, 10, pair[1].sink)
    assert not [thread for thread in threading.enumerate() if thread.name in {"kv-send-a", "kv-receive-b"}]
