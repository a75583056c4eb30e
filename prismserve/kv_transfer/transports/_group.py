"""Two-member process groups of torch.distributed, formed through a store that one of the two serves, and their frames.

gloo moves CPU tensors; where both members have a GPU and NCCL, the bytes of writes go through an NCCL group beside it.
Every wait has a deadline. With gloo, a wait that runs out closes the connection for good, so frames are also sent when
there is nothing to say: a member that hears nothing for :data:`SILENCE_S` may take the other for dead.
"""

from __future__ import annotations

import socket
import struct
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed

from prismserve.core.errors import ConfigurationError, TransferError, TransportError
from prismserve.kv_transfer.wire import NOTIFICATION_BYTES_MAX

dist: Any = torch.distributed
"""Untyped: the classes used here are not among those its stubs export."""
KEEP_ALIVE_S: Final = 2.0
SILENCE_S: Final = 20.0
SERVER, CLIENT = 0, 1
_MEMBERS: Final = 2
_HEADER: Final = struct.Struct("<QQH")
"""Offset in the arena, bytes, bytes of the notification; all zero in a frame that only keeps the link alive."""
FRAME_BYTES: Final = _HEADER.size + NOTIFICATION_BYTES_MAX
FOREIGN_ERRORS: Final = (RuntimeError, ValueError, OSError)
"""What torch.distributed raises; its own classes derive from RuntimeError."""


def device() -> str:
    """Where the bytes of writes travel: ``cuda`` with a GPU and NCCL, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available() else "cpu"


def serve_store(host: str, timeout_s: float) -> tuple[Any, int]:
    """A store listening on ``host`` alone, and its port; ConfigurationError if it cannot be."""
    if not dist.is_available() or not dist.is_gloo_available():
        message = "transport nccl: this build of torch has no torch.distributed with gloo"
        raise ConfigurationError(message, field="transfer.transports")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.bind((host, 0))
        listener.listen(64)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.fileno(),
        )
    except FOREIGN_ERRORS as error:
        listener.close()
        message = f"transport nccl: a store cannot listen on {host}: {error}"
        raise ConfigurationError(message, field="transfer.host") from error
    listener.detach()  # the store's own from here on
    return store, port


def reach_store(host: str, port: int, timeout_s: float) -> Any:
    """A connection to a peer's store; what torch.distributed raises goes through."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


class Group:
    """One member of a pair. Not thread-safe, but for :meth:`close`.

    Args:
        store: that both members use.
        name: of the pair, unguessable, the same at both members.
        rank: SERVER or CLIENT.
        host: local address that the other can reach.
        on: ``cuda`` or ``cpu``, the same at both members.
        timeout_s: for the other to turn up.
    """

    def __init__(self, store: Any, name: str, rank: int, host: str, on: str, timeout_s: float) -> None:
        self._other = CLIENT if rank == SERVER else SERVER
        self._device = on
        options = dist.ProcessGroupGloo._Options()  # noqa: SLF001 - the only way to bind gloo to one address
        options._timeout = timedelta(seconds=timeout_s)  # noqa: SLF001 - as above
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]  # noqa: SLF001 - as above
        self._groups: list[Any] = [
            dist.ProcessGroupGloo(dist.PrefixStore(f"{name}/gloo", store), rank, _MEMBERS, options)
        ]
        if on == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timedelta(seconds=timeout_s)  # noqa: SLF001 - as above
            self._groups.append(dist.ProcessGroupNCCL(dist.PrefixStore(f"{name}/nccl", store), rank, _MEMBERS, nccl))

    def _member(self, index: int) -> Any:
        groups = self._groups
        if not groups:
            message = "the group is closed"
            raise RuntimeError(message)
        return groups[index]

    def send(self, tensor: torch.Tensor, timeout_s: float, tag: int = 0) -> None:
        """Hand a uint8 CPU tensor to the other over gloo."""
        self._member(0).send([tensor], self._other, tag).wait(timedelta(seconds=timeout_s))

    def receive(self, tensor: torch.Tensor, timeout_s: float, tag: int = 0) -> None:
        """Fill a uint8 CPU tensor from the other over gloo."""
        self._member(0).recv([tensor], self._other, tag).wait(timedelta(seconds=timeout_s))

    def send_bytes(self, tensor: torch.Tensor, timeout_s: float) -> None:
        """The bytes of a write, over NCCL where there is one."""
        if self._device == "cpu":
            self.send(tensor, timeout_s)
            return
        self._member(1).send([tensor.to(self._device)], self._other, 0).wait(timedelta(seconds=timeout_s))
        torch.cuda.current_stream().synchronize()

    def receive_bytes(self, tensor: torch.Tensor, timeout_s: float) -> None:
        """As :meth:`send_bytes`, the other way."""
        if self._device == "cpu":
            self.receive(tensor, timeout_s)
            return
        landed = torch.empty_like(tensor, device=self._device)
        self._member(1).recv([landed], self._other, 0).wait(timedelta(seconds=timeout_s))
        tensor.copy_(landed)

    def close(self) -> None:
        """End the connection; whoever waits in it gets an error. Harmless when closed."""
        groups, self._groups = self._groups, []
        for group in groups:
            group.abort()


def frame(offset_bytes: int, nbytes: int, notification: bytes) -> torch.Tensor:
    """What announces a write: uint8 [FRAME_BYTES]; TransportError if the notification is too long."""
    if len(notification) > NOTIFICATION_BYTES_MAX:
        message = f"a notification has {len(notification)} bytes; the limit is {NOTIFICATION_BYTES_MAX}"
        raise TransportError(message)
    raw = bytearray(FRAME_BYTES)
    _HEADER.pack_into(raw, 0, offset_bytes, nbytes, len(notification))
    raw[_HEADER.size : _HEADER.size + len(notification)] = notification
    return torch.frombuffer(raw, dtype=torch.uint8)


def parse(raw: torch.Tensor, landing_bytes: int) -> tuple[int, int, bytes]:
    """Offset, bytes and notification of a frame; TransferError if they cannot be."""
    data = raw.numpy().tobytes()
    offset_bytes, nbytes, length = _HEADER.unpack_from(data)
    if offset_bytes + nbytes > landing_bytes or length > NOTIFICATION_BYTES_MAX:
        message = f"bytes {offset_bytes} to {offset_bytes + nbytes} leave the {landing_bytes} landing bytes"
        raise TransferError(message)
    return offset_bytes, nbytes, data[_HEADER.size : _HEADER.size + length]
