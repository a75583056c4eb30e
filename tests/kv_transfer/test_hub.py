from __future__ import annotations

from dataclasses import replace

import pytest
from kv_transfer_conftest import until

from prismserve.core.errors import ConfigurationError, TransferError, TransportError
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.hub import TransportHub
from prismserve.kv_transfer.transports import base, local, shm


def test_a_link_is_kept_per_worker_and_epoch(make_worker):
    here, there = make_worker("a"), make_worker("b")
    link = here.hub.connect(there.info)
    assert here.hub.connect(there.info) is link
    assert here.hub.connect(replace(there.info, epoch=2)) is not link
    with pytest.raises(TransportError, match="superseded"):
        here.hub.connect(there.info)


def test_a_failing_link_is_passed_over_for_the_next_transport(make_worker):
    config = TransferConfig(arena_bytes=8 << 20, transports=("local", "shm"))
    here, there = make_worker("a", config), make_worker("b", config)
    assert here.hub.connect(there.info).transport == "local"
    here.hub.failed(there.info, "local")
    assert here.hub.connect(there.info).transport == "shm"
    here.hub.succeeded(there.info, "local", 0, 0.0)
    assert here.hub.connect(there.info).transport == "local"


def test_the_link_that_writes_fastest_is_preferred_once_it_has_been_measured(make_worker):
    config = TransferConfig(arena_bytes=32 << 20, transports=("nixl", "local"))
    here, there = make_worker("a", config), make_worker("b", config)
    assert here.hub.connect(there.info).transport == "nixl"
    until(lambda: all(here.hub.bandwidth("b").values()) and len(here.hub.bandwidth("b")) == 2, 10)
    rates = here.hub.bandwidth("b")
    fastest = max(rates, key=rates.get)
    if rates[fastest] > 1.25 * rates["nixl"]:
        assert here.hub.connect(there.info).transport == fastest
    here.hub.failed(there.info, fastest)
    assert here.hub.connect(there.info).transport != fastest
    here.hub.succeeded(there.info, fastest, 0, 0.0)
    assert there.receiver.stats.notifications_refused == 0
    until(lambda: here.arena.used_staging_pages == 0)


def test_a_link_that_cannot_be_measured_is_passed_over_and_tried_again_later(make_worker, monkeypatch):
    def broken(self, offset_bytes, nbytes):
        raise TransportError("no wire")

    monkeypatch.setattr(local.LocalLink, "stage", broken)
    config = TransferConfig(arena_bytes=32 << 20, transports=("local", "shm"), link_backoff_s=0.2)
    here, there = make_worker("a", config), make_worker("b", config)
    here.hub.connect(there.info)
    until(lambda: here.hub.connect(there.info).transport == "shm")
    until(lambda: here.hub.connect(there.info).transport == "local")


def test_in_the_configured_order_nothing_is_measured(make_worker):
    config = TransferConfig(arena_bytes=32 << 20, transports=("local", "shm"), link_choice="order")
    here, there = make_worker("a", config), make_worker("b", config)
    assert here.hub.connect(there.info).transport == "local"
    assert here.hub.bandwidth("b") == {"local": 0.0}


def test_endpoints_of_somebody_else_malformed_or_without_a_common_transport_are_refused(make_worker):
    here, there = make_worker("a"), make_worker("b")
    other = make_worker("c", TransferConfig(arena_bytes=8 << 20, transports=("shm",)))
    with pytest.raises(TransportError, match="names worker b"):
        here.hub.connect(replace(there.info, worker_id="x"))
    with pytest.raises(TransferError):
        here.hub.connect(replace(there.info, endpoint=b"\x80"))
    with pytest.raises(TransportError, match="this worker has local, it has shm"):
        here.hub.connect(other.info)


def test_a_transport_this_machine_cannot_do_is_left_out_with_its_reason(monkeypatch):
    def cannot(*_):
        raise ConfigurationError("transport shm: no sockets here")

    config = TransferConfig(arena_bytes=8 << 20, transports=("shm", "local"))
    monkeypatch.setattr(shm, "TRANSPORT", cannot)
    arena = Arena(config)
    hub = TransportHub("a", arena, config)
    assert hub.transports == ("local",)
    assert "no sockets" in hub.unavailable["shm"]
    hub.close()
    with pytest.raises(ConfigurationError, match="no transport can be opened"):
        TransportHub("a", arena, TransferConfig(arena_bytes=8 << 20, transports=("shm",)))
    arena.close()


def test_an_unknown_transport_is_an_error_that_lists_those_there_are():
    assert base.names() == ("local", "nccl", "nixl", "shm")
    with pytest.raises(ConfigurationError, match="available: local, nccl, nixl, shm"):
        base.factory("carrier-pigeon")
