from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismserve.core.errors import TransferError
from prismserve.core.types import Payload
from prismserve.kv_transfer.wire import (
    NOTIFICATION_BYTES_MAX,
    PAYLOADS_MAX,
    Checksum,
    Endpoint,
    checksum,
    decode_endpoint,
    decode_notification,
    encode_end,
    encode_endpoint,
    encode_payloads,
    encode_probe,
)

PIECE = [0, 0, 1, 0, 1, 0, bytes(16)]
u64 = st.integers(0, 2**64 - 1)
digests = st.binary(min_size=16, max_size=16)
payloads = st.builds(Payload, st.integers(-1, 2**32), u64, u64, u64, u64, digests, st.integers(0, 255))


@given(u64, u64, st.lists(payloads, min_size=1, max_size=PAYLOADS_MAX))
def test_notifications_survive_the_wire_under_the_cap(lease_id, generation, pieces):
    raw = encode_payloads(lease_id, generation, pieces)
    assert len(raw) <= NOTIFICATION_BYTES_MAX
    note = decode_notification(raw)
    assert (note.lease_id, note.generation, note.payloads) == (lease_id, generation, tuple(pieces))
    assert decode_notification(encode_end(lease_id, generation)).payloads == ()
    assert decode_notification(encode_probe()) is None


@given(st.lists(digests, max_size=4))
def test_a_checksum_over_parts_is_that_of_their_bytes_together(parts):
    state = Checksum()
    for part in parts:
        state.update(part)
    assert state.digest() == checksum(b"".join(parts))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_transfer_error_and_nothing_else(raw):
    with pytest.raises(TransferError):
        decode_notification(raw)
    with pytest.raises(TransferError):
        decode_endpoint(raw)


@pytest.mark.parametrize(
    "fields",
    [
        [1, 1, 3, 4, [PIECE]],
        [3, 1, 3, 4, [PIECE]],
        [2, 4, 3, 4, [PIECE]],
        [2, 1, 3, 4, []],
        [2, 1, 3, 4, PIECE],
        [2, 1, 3, 4, [PIECE] * 17],
        [2, 1, 3, 4, [[*PIECE[:-1], bytes(15)]]],
        [2, 1, 3, 4, [[*PIECE, 0]]],
        [2, 1, 3, 4, [[0, 0, 1, -1, 1, 0, bytes(16)]]],
        [2, 1, 3, 4, [[-2, 0, 1, 0, 1, 0, bytes(16)]]],
        [2, 1, 3, 4, [[0.5, 0, 1, 0, 1, 0, bytes(16)]]],
        [2, 1, 3, 4, [[True, 0, 1, 0, 1, 0, bytes(16)]]],
        [2, 1, 3, 4, [["0", 0, 1, 0, 1, 0, bytes(16)]]],
        [2, 1, [3], 4, [PIECE]],
        [2, 1, 3, -4, [PIECE]],
        [2, 1, 3, 4],
        [2, 2, 3, 4, 5],
        [2, 3, 3],
        [2],
        [],
        {"version": 2},
        1,
        None,
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(fields):
    with pytest.raises(TransferError):
        decode_notification(msgpack.packb(fields))


def test_endpoints_survive_the_wire_and_are_capped():
    endpoint = Endpoint(worker_id="w", transports={"nixl": {"metadata": b"\x00\xff", "base_address": 2**47}})
    assert decode_endpoint(encode_endpoint(endpoint)) == endpoint
    with pytest.raises(TransferError, match="65536"):
        encode_endpoint(Endpoint(worker_id="w", transports={"x": {"metadata": bytes(70000)}}))
    with pytest.raises(TransferError):
        decode_endpoint(bytes(70000))


@pytest.mark.parametrize(
    "value", [{}, {"version": 1, "worker_id": "w", "transports": {}}, {"worker_id": "", "transports": {}}, [1]]
)
def test_malformed_endpoints_are_refused(value):
    with pytest.raises(TransferError):
        decode_endpoint(msgpack.packb(value))
