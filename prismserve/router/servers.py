"""The sockets of the front doors: HTTP by uvicorn, gRPC by grpc.aio, both in the caller's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from prismserve.core.errors import ConfigurationError
from prismserve.router.grpc_server import GrpcDoor
from prismserve.router.openai import create_app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prismserve.router.config import RouterConfig
    from prismserve.router.service import RouterService

_BACKLOG = 1024
_HEADER_BYTES_MAX = 32 << 10


def _header_protocol(timeout_s: float) -> type[H11Protocol]:
    """Give uvicorn's protocol a limit on the time until all headers of a request have arrived."""

    class HeaderTimeoutProtocol(H11Protocol):
        """Answers 408 and closes when a connection dawdles before or within the headers."""

        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._arm()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._serving():
                self._disarm()
            elif self._header_timer is None:
                self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def _serving(self) -> bool:
            cycle: RequestResponseCycle | None = self.cycle
            return cycle is not None and not cycle.response_complete

        def _arm(self) -> None:
            self._header_timer = self.loop.call_later(timeout_s, self._expire)

        def _disarm(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _expire(self) -> None:
            self._header_timer = None
            if not self._serving() and not self.transport.is_closing():
                self.transport.write(_timeout_reply())
                self.transport.close()

    return HeaderTimeoutProtocol


def _timeout_reply() -> bytes:
    body = b'{"error":{"message":"the headers did not arrive in time","type":"invalid_request_error"}}'
    head = (
        "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: the process that hosts the router decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture nothing."""
        yield


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigurationError in one sentence when the address is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        message = f"host {host!r} cannot be resolved: {error.strerror or error}"
        raise ConfigurationError(message, field="host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        message = f"cannot listen on {host}:{port}: {error.strerror or error}; choose another port"
        raise ConfigurationError(message, field="port") from error
    return listener


class FrontDoors:
    """Starts and stops both servers.

    Attributes:
        http_port: the port bound, after :meth:`start`.
        grpc_port: the port bound, after :meth:`start`.

    Args:
        service: started by its owner before, stopped after.
    """

    def __init__(self, service: RouterService) -> None:
        self._service = service
        self._config: RouterConfig = service.config
        self._http: _Server | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._grpc: GrpcDoor | None = None
        self.http_port = 0
        self.grpc_port = 0

    async def start(self, host: str, port: int, grpc_port: int) -> None:
        """Bind and serve; ConfigurationError when a port is busy, and then nothing stays bound."""
        listener = _listen(host, port)
        grpc_door = GrpcDoor(self._service, self._config)
        try:
            self.grpc_port = await grpc_door.start(host, grpc_port)
        except OSError as error:
            listener.close()
            message = f"cannot listen on {host}:{grpc_port}: address already in use or not ours; choose another port"
            raise ConfigurationError(message, field="grpc_port") from error
        self._grpc = grpc_door
        self.http_port = listener.getsockname()[1]
        self._http = _Server(self._http_config())
        self._http_task = asyncio.create_task(self._http.serve(sockets=[listener]), name="http")
        while not self._http.started:
            if self._http_task.done():
                await self._http_task
                message = "the HTTP server ended while starting"
                raise ConfigurationError(message, field="port")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Stop accepting, let open responses end within ``stop_timeout_s``, close everything."""
        stops: list[Any] = []
        if self._http is not None and self._http_task is not None:
            self._http.should_exit = True
            stops.append(self._http_task)
        if self._grpc is not None:
            stops.append(self._grpc.stop())
        for result in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    def _http_config(self) -> uvicorn.Config:
        app = create_app(self._service)
        return uvicorn.Config(
            app,
            http=_header_protocol(self._config.header_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=self._config.max_connections,
            timeout_keep_alive=self._config.keep_alive_s,
            timeout_graceful_shutdown=max(1, round(self._config.stop_timeout_s)),
            h11_max_incomplete_event_size=_HEADER_BYTES_MAX,
        )
