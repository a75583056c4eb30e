from __future__ import annotations

import pytest
from kv_transfer_conftest import until

from prismserve.core.errors import ConfigurationError, OverloadedError, PrismServeError, TransportError
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.transports import nixl

CONFIG = TransferConfig(arena_bytes=1 << 20, transports=("nixl",), write_timeout_s=0.2)


@pytest.fixture
def two():
    arenas = Arena(CONFIG), Arena(CONFIG)
    transports = [nixl.NixlTransport("same-name", arena, CONFIG) for arena in arenas]
    yield transports
    for transport in transports:
        transport.close()
        transport.close()
    for arena in arenas:
        arena.close()


def test_every_error_of_the_bindings_becomes_a_transport_error(two):
    foreign = nixl.foreign_errors(two[0]._api)
    assert {error.__name__ for error in foreign} >= {
        "nixlBackendError",
        "nixlNotFoundError",
        "nixlRemoteDisconnectError",
        "nixlCancelledError",
        "nixlUnknownError",
    }
    for error in foreign:
        with pytest.raises(TransportError, match=f"nixl write failed: {error.__name__}"), two[0].translated("write"):
            raise error("reason")


def test_agents_of_workers_with_one_name_are_told_apart(two):
    assert two[0].endpoint()["agent"] != two[1].endpoint()["agent"]
    assert not two[0].reachable(two[0].endpoint())
    assert two[0].reachable(two[1].endpoint())


def test_metadata_that_is_damaged_or_of_another_agent_is_refused(two):
    endpoint = dict(two[1].endpoint())
    for wrong in ({"metadata": b"junk"}, {"metadata": b""}, {"agent": "other"}, {"base_address": -1}, {"extra": 1}):
        with pytest.raises(TransportError):
            two[0].connect({**endpoint, **wrong})
    assert two[0].connect(endpoint).transport == "nixl"


def test_writes_stay_inside_the_peers_landing_pages_and_staging_is_bounded(two):
    link = two[0].connect(two[1].endpoint())
    landing = two[1].arena.landing_bytes
    for offset, nbytes in [(-1, 1), (landing, 1), (0, landing + 1)]:
        with pytest.raises(TransportError, match="landing bytes"):
            link.stage(offset, nbytes)
    held = [link.stage(0, 65536) for _ in range(CONFIG.staging_pages)]
    with pytest.raises(OverloadedError):
        link.stage(0, 1)
    for staged in held:
        staged.discard()
    assert two[0].arena.used_staging_pages == 0


def test_a_cancelled_write_gives_its_staging_back(two):
    link = two[0].connect(two[1].endpoint())
    handle = link.stage(0, 4096).submit(b"n")
    handle.cancel()
    handle.cancel()
    assert handle.poll()
    two[0].poll()
    assert two[0].arena.used_staging_pages == 0


class Says:
    """The bindings of an agent, but every write is in one state."""

    def __init__(self, bindings, state):
        self._bindings = bindings
        self._state = state

    def postXferReq(self, *_):  # noqa: N802 - the binding's name
        return self._state

    getXferStatus = postXferReq  # noqa: N815 - the binding's name

    def __getattr__(self, name):
        return getattr(self._bindings, name)


@pytest.mark.parametrize(
    ("state", "reason"), [("NIXL_ERR_BACKEND", "state NIXL_ERR_BACKEND"), ("NIXL_IN_PROG", "deadline")]
)
def test_a_write_that_nixl_reports_failed_or_never_finishes_is_an_error_and_frees_its_staging(
    state, reason, two, monkeypatch
):
    handle = two[0].connect(two[1].endpoint()).stage(0, 4096).submit(b"n")
    monkeypatch.setattr(two[0].agent, "agent", Says(two[0].bindings, getattr(two[0]._api.nixlBind, state)))
    with pytest.raises(TransportError, match=reason):
        until(handle.poll)
    until(lambda: not two[0].poll() and two[0].arena.used_staging_pages == 0)


def test_a_write_that_cannot_be_released_yet_keeps_its_staging_until_it_can(two, monkeypatch):
    bindings, error = two[0].bindings, two[0]._api.nixlBind.nixlBackendError

    class Busy(Says):
        def releaseXferReq(self, *_):  # noqa: N802 - the binding's name
            raise error("still in flight")

    handle = two[0].connect(two[1].endpoint()).stage(0, 4096).submit(b"n")
    monkeypatch.setattr(two[0].agent, "agent", Busy(bindings, None))
    handle.cancel()
    two[0].poll()
    assert two[0].arena.used_staging_pages == 1
    monkeypatch.setattr(two[0].agent, "agent", bindings)
    two[0].poll()
    assert two[0].arena.used_staging_pages == 0


def test_a_closed_link_or_transport_says_so(two):
    link = two[0].connect(two[1].endpoint())
    link.close()
    link.close()
    with pytest.raises(TransportError, match="closed"):
        link.stage(0, 1)
    two[0].close()
    with pytest.raises(TransportError, match="closed"):
        two[0].connect(two[1].endpoint())
    assert two[0].poll() == []


def test_a_machine_without_nixl_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(nixl, "_MODULES", ("no_such_module",))
    with pytest.raises(ConfigurationError, match="install nixl") as caught:
        nixl.NixlTransport("a", None, CONFIG)
    assert isinstance(caught.value, PrismServeError)
