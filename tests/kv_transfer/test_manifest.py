from __future__ import annotations

from dataclasses import replace

import pytest
from kv_transfer_conftest import LAYOUT, expect, spec

from prismserve.core.errors import IncompatibleLayoutError, LeaseExpiredError, TransferError
from prismserve.core.types import Payload
from prismserve.kv_transfer.manifest import build, verify

EXPECTED = expect(tokens=30, cached_tokens=10)
SIZE = LAYOUT.token_layer_bytes
PAYLOADS = tuple(
    Payload(layer, start, 10, (layer * 2 + index) * 10 * SIZE, 10 * SIZE, bytes(16))
    for layer in range(LAYOUT.layers)
    for index, start in enumerate((10, 20))
)
ROOM = 60 * SIZE
GOOD = build(EXPECTED, LAYOUT, PAYLOADS, layer_tokens=(30,) * LAYOUT.layers, next_position=30)


def test_a_complete_manifest_is_accepted_in_any_order_and_counts_raw_bytes():
    verify(GOOD, EXPECTED, LAYOUT, ROOM)
    verify(replace(GOOD, payloads=PAYLOADS[::-1]), EXPECTED, LAYOUT, ROOM)
    assert GOOD.raw_bytes == ROOM


@pytest.mark.parametrize("change", [{"request_id": "x"}, {"attempt": 1}, {"source_worker": "z"}, {"source_epoch": 0}])
def test_another_request_attempt_worker_or_epoch_is_fenced(change):
    with pytest.raises(LeaseExpiredError, match=next(iter(change))):
        verify(replace(GOOD, **change), EXPECTED, LAYOUT, ROOM)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"version": 9},
        {"layout_fingerprint": bytes(32)},
        {"namespace": bytes(32)},
        {"codec": spec("int8")},
    ],
)
def test_kv_that_is_not_interchangeable_is_refused_with_both_sides_named(change):
    with pytest.raises(IncompatibleLayoutError, match=r"worker a.*this worker|this worker.*worker a"):
        verify(replace(GOOD, **change), EXPECTED, LAYOUT, ROOM)


def test_a_version_mismatch_says_which_side_to_upgrade():
    with pytest.raises(IncompatibleLayoutError, match="upgrade worker a"):
        verify(replace(GOOD, version=0), EXPECTED, LAYOUT, ROOM)
    with pytest.raises(IncompatibleLayoutError, match="upgrade this worker"):
        verify(replace(GOOD, version=9), EXPECTED, LAYOUT, ROOM)


def changed(index: int, **fields) -> tuple[Payload, ...]:
    return tuple(replace(piece, **fields) if i == index else piece for i, piece in enumerate(PAYLOADS))


@pytest.mark.parametrize(
    "payloads",
    [
        PAYLOADS[1:],
        PAYLOADS[:-1],
        (*PAYLOADS, replace(PAYLOADS[0], offset_bytes=ROOM)),
        changed(1, start_token=10),
        changed(1, start_token=21),
        changed(0, layer=7),
        changed(0, layer=-1),
        changed(0, tokens=0),
        changed(0, encoded_bytes=10 * SIZE - 1),
        changed(1, offset_bytes=5),
        changed(5, offset_bytes=ROOM),
        changed(0, checksum=bytes(15)),
        changed(0, codec=1),
        changed(5, tokens=11, encoded_bytes=11 * SIZE),
        (),
    ],
)
def test_missing_repeated_overlapping_or_impossible_payloads_are_refused(payloads):
    with pytest.raises(TransferError):
        verify(replace(GOOD, payloads=payloads), EXPECTED, LAYOUT, ROOM)


@pytest.mark.parametrize("layer_tokens", [(30,), (30, 30, 31), (30, 30, 29), (30, 30, 30, 30), ()])
def test_layer_lengths_must_be_those_of_the_payloads(layer_tokens):
    with pytest.raises(TransferError):
        verify(replace(GOOD, layer_tokens=layer_tokens), EXPECTED, LAYOUT, ROOM)


def test_layers_may_have_different_lengths():
    ragged = tuple(piece for piece in PAYLOADS if (piece.layer, piece.start_token) != (2, 20))
    verify(replace(GOOD, payloads=ragged, layer_tokens=(30, 30, 20)), EXPECTED, LAYOUT, ROOM)
