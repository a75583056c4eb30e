"""The transports of one worker, and its links to others."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prismserve.core.errors import ConfigurationError, TransportError
from prismserve.core.types import WorkerInfo
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.health import LinkHealth
from prismserve.kv_transfer.probe import Probe
from prismserve.kv_transfer.send_loop import SendLoop
from prismserve.kv_transfer.transports.base import Link, Transport, factory
from prismserve.kv_transfer.wire import Endpoint, decode_endpoint, encode_endpoint

_PEERS_MAX = 1024
_RATES_MAX = 64
_CHOICE = 2
"""From so many common transports on there is something to choose."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Peer:
    """What is known of one worker epoch."""

    info: WorkerInfo
    endpoint: Endpoint
    health: LinkHealth
    links: dict[str, Link] = field(default_factory=dict)
    probe_s: float = float("-inf")


class TransportHub:
    """Opens the transports this machine can do, and links to peers over the best one both ends can.

    Args:
        worker_id: of this worker; endpoints name it.
        arena: where peers write.
        config: which transports, best first; ConfigurationError if none of them can be opened, or a name is unknown.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, worker_id: str, arena: Arena, config: TransferConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.worker_id = worker_id
        self.arena = arena
        self.config = config
        self.clock = clock
        self._open: dict[str, Transport] = {}
        self._unavailable: dict[str, str] = {}
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self._lock = threading.RLock()
        for name in config.transports:
            build = factory(name)
            try:
                self._open[name] = build(worker_id, arena, config)
            except ConfigurationError as error:
                self._unavailable[name] = error.message
                _log.warning("%s", error.message)
        if not self._open:
            message = f"no transport can be opened: {'; '.join(self._unavailable.values())}"
            raise ConfigurationError(message, field="transfer.transports")
        self._sender = SendLoop(name=f"kv-send-{worker_id}")

    @property
    def transports(self) -> tuple[str, ...]:
        """Names of the open transports, best first."""
        return tuple(self._open)

    @property
    def unavailable(self) -> Mapping[str, str]:
        """Configured transports that could not be opened, with the reason."""
        return dict(self._unavailable)

    @property
    def opened(self) -> tuple[Transport, ...]:
        """The open transports, for the receiver to poll."""
        return tuple(self._open.values())

    @property
    def sender(self) -> SendLoop:
        """The thread all outgoing transfers of this worker share."""
        return self._sender

    def endpoint(self) -> bytes:
        """What peers need to connect; goes into ``WorkerInfo.endpoint``."""
        entries = {name: dict(transport.endpoint()) for name, transport in self._open.items()}
        return encode_endpoint(Endpoint(worker_id=self.worker_id, probe=self.arena.probe_area, transports=entries))

    def connect(self, info: WorkerInfo) -> Link:
        """A link to a worker of the registry, over the best transport that both ends can do and that connects.

        Links are kept per worker and epoch; a newer epoch drops those of the older. Where there is a choice, a probe
        of all links is started now and then; until it has ended, the configured order decides.

        Raises:
            TransportError: there is no common transport, none connects, or the epoch has been superseded.
            TransferError: the worker's endpoint is malformed.
        """
        with self._lock:
            peer = self._peer(info)
            reasons: list[str] = []
            common = self._common(peer.endpoint, reasons)
            for name in peer.health.order(common, self.clock()):
                link = self._link(peer, name, reasons)
                if link is not None:
                    self._probe(peer, common)
                    return link
        here, there = ", ".join(self._open), ", ".join(peer.endpoint.transports) or "none"
        why = "; ".join(reasons) or f"this worker has {here}, it has {there}, none reaches it"
        message = f"no transport connects to worker {info.worker_id}: {why}"
        raise TransportError(message)

    def _link(self, peer: _Peer, name: str, reasons: list[str]) -> Link | None:
        """The link of this transport; None, with the reason noted and the failure counted, if it does not connect."""
        link = peer.links.get(name)
        if link is None:
            try:
                link = peer.links[name] = self._open[name].connect(peer.endpoint.transports[name])
            except TransportError as error:
                peer.health.failed(name, self.clock())
                reasons.append(f"{name}: {error.message}")
        return link

    def _probe(self, peer: _Peer, common: list[str]) -> None:
        """Measure the links to a peer, if there is a choice and it has not been done for a while."""
        now_s = self.clock()
        if (
            self.config.link_choice != "measured"
            or len(common) < _CHOICE
            or not peer.endpoint.probe[1]
            or now_s < peer.probe_s + self.config.probe_interval_s
        ):
            return
        peer.probe_s = now_s
        found = (self._link(peer, name, []) for name in common)
        links = [link for link in found if link is not None]

        def measured(transport: str, bytes_per_s: float) -> None:
            if bytes_per_s:
                with self._lock:
                    peer.health.rate(transport).probed(bytes_per_s)
            else:
                self.failed(peer.info, transport)

        self._sender.add(Probe(links, peer.endpoint.probe, self.config.write_timeout_s, measured))

    def bandwidth(self, worker_id: str) -> dict[str, float]:
        """Measured bytes per second of every link to a worker; 0.0 where nothing has been measured."""
        with self._lock:
            peer = self._peers.get(worker_id)
            return {} if peer is None else {name: peer.health.rate(name).bytes_per_s for name in peer.links}

    def rates(self) -> dict[str, float]:
        """Measured bytes per second of the fastest link to each worker something was sent to, at most 64, newest last."""
        with self._lock:
            best = {
                name: max((peer.health.rate(link).bytes_per_s for link in peer.links), default=0.0)
                for name, peer in list(self._peers.items())[-_RATES_MAX:]
            }
        return {name: rate for name, rate in best.items() if rate}

    def _common(self, endpoint: Endpoint, reasons: list[str]) -> list[str]:
        common: list[str] = []
        for name, transport in self._open.items():
            if name not in endpoint.transports:
                continue
            try:
                if transport.reachable(endpoint.transports[name]):
                    common.append(name)
            except TransportError as error:
                reasons.append(f"{name}: {error.message}")
        return common

    def _peer(self, info: WorkerInfo) -> _Peer:
        peer = self._peers.get(info.worker_id)
        if peer is not None and peer.info.epoch > info.epoch:
            message = f"epoch {info.epoch} of worker {info.worker_id} was superseded by {peer.info.epoch}"
            raise TransportError(message)
        if peer is None or peer.info.epoch < info.epoch or peer.info.endpoint != info.endpoint:
            endpoint = decode_endpoint(info.endpoint)
            if endpoint.worker_id != info.worker_id:
                message = f"the endpoint of worker {info.worker_id} names worker {endpoint.worker_id}"
                raise TransportError(message)
            self.forget(info.worker_id)
            peer = self._peers[info.worker_id] = _Peer(info, endpoint, LinkHealth(self.config))
            while len(self._peers) > _PEERS_MAX:
                self.forget(next(iter(self._peers)))
        self._peers.move_to_end(info.worker_id)
        return peer

    def succeeded(self, info: WorkerInfo, transport: str, nbytes: int, started_s: float) -> None:
        """A write of ``nbytes`` bytes over a link is done; it started at ``started_s`` of :attr:`clock`."""
        with self._lock:
            peer = self._peers.get(info.worker_id)
            if peer is not None and peer.info.epoch == info.epoch:
                peer.health.succeeded(transport)
                peer.health.rate(transport).wrote(nbytes, started_s, self.clock())

    def failed(self, info: WorkerInfo, transport: str) -> None:
        """A write over a link failed: it is closed and passed over for a while."""
        with self._lock:
            peer = self._peers.get(info.worker_id)
            if peer is None or peer.info.epoch != info.epoch:
                return
            peer.health.failed(transport, self.clock())
            link = peer.links.pop(transport, None)
        if link is not None:
            link.close()

    def forget(self, worker_id: str) -> None:
        """Close every link to a worker (it is lost, or another epoch took its name); writes in flight fail."""
        with self._lock:
            peer = self._peers.pop(worker_id, None)
        if peer is not None:
            for link in peer.links.values():
                link.close()

    def close(self) -> None:
        """Fail what is being sent, close links and transports. The receiver must have been closed before."""
        self._sender.close()
        with self._lock:
            workers = list(self._peers)
        for worker_id in workers:
            self.forget(worker_id)
        for transport in self._open.values():
            transport.close()
