"""Stored forms: what goes in comes out, and nothing else is accepted."""

from __future__ import annotations

import pickle

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismserve.core.errors import ConfigurationError
from prismserve.core.types import KVLayout, Role, Tier, WorkerInfo, WorkerState
from prismserve.kv_transfer.index.events import EventKind, IndexEvent
from prismserve.kv_transfer.index.records import decode_event, decode_worker, encode_event, encode_worker

layouts = st.builds(
    KVLayout,
    dtype=st.sampled_from(["float32", "bfloat16"]),
    layers=st.integers(1, 200),
    kv_heads=st.integers(1, 64),
    head_dim=st.integers(1, 256),
    block_tokens=st.integers(1, 64),
    position_scheme=st.text(max_size=10),
)
infos = st.builds(
    WorkerInfo,
    worker_id=st.from_regex(r"\A[A-Za-z0-9._:@-]{1,128}\Z"),
    role=st.sampled_from(Role),
    epoch=st.integers(0, 2**52),
    pid=st.integers(0, 2**22),
    node=st.text(max_size=50),
    control_address=st.text(max_size=50),
    model_fingerprint=st.binary(max_size=32),
    layout=layouts,
    transports=st.lists(st.text(max_size=8), max_size=5).map(tuple),
    endpoint=st.binary(max_size=300),
    state=st.sampled_from(WorkerState),
)
keys = st.lists(st.binary(min_size=32, max_size=32), max_size=5)


@given(infos)
@settings(max_examples=50, deadline=None)
def test_worker_records_survive_the_trip(info):
    assert decode_worker(encode_worker(info)) == info


@given(infos, keys, keys, st.sampled_from(EventKind), st.sampled_from(Tier))
@settings(max_examples=50, deadline=None)
def test_events_survive_the_trip(info, added, removed, kind, tier):
    carries = kind in (EventKind.REGISTER, EventKind.STATE)
    event = IndexEvent(kind, info.worker_id, info.epoch, added, removed, info if carries else None, tier)
    assert decode_event(encode_event(event)) == event


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_are_refused_with_our_error(data):
    for decode in (decode_worker, decode_event):
        with pytest.raises(ConfigurationError):
            decode(data)


def test_another_version_is_refused_and_both_versions_are_named(info):
    fields = msgpack.unpackb(encode_worker(info()))
    fields[0] = 9
    with pytest.raises(ConfigurationError, match="has version 9, this process reads version 2"):
        decode_worker(msgpack.packb(fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [(1, "a b"), (2, "boss"), (3, -1), (3, True), (4, 2**60), (5, b"x"), (7, "x"), (8, [1]), (9, "shm"), (11, 3)],
)
def test_a_field_of_another_kind_is_refused(info, field, value):
    fields = msgpack.unpackb(encode_worker(info()))
    fields[field] = value
    with pytest.raises(ConfigurationError):
        decode_worker(msgpack.packb(fields))


def test_records_over_the_length_cap_are_refused_before_they_are_parsed():
    with pytest.raises(ConfigurationError, match="the limit is 65536"):
        decode_worker(b"\x90" * 65537)


def test_a_pickle_is_refused_and_not_run():
    class Canary:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    with pytest.raises(ConfigurationError):
        decode_worker(pickle.dumps(Canary()))


def test_a_record_under_another_workers_event_is_refused(info):
    event = IndexEvent(EventKind.REGISTER, "w2", 1, info=info("w1"))
    with pytest.raises(ConfigurationError, match="malformed"):
        decode_event(encode_event(event))


def test_keys_cut_short_are_refused():
    fields = msgpack.unpackb(encode_event(IndexEvent(EventKind.ANNOUNCE, "w", 1, [b"k" * 32])))
    fields[4] = b"k" * 33
    with pytest.raises(ConfigurationError, match="added"):
        decode_event(msgpack.packb(fields))
