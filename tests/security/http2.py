"""An HTTP/2 client of a few frames, for saying what a well-behaved one never would (RFC 9113, RFC 7541)."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _CONTINUATION = 0, 1, 3, 4, 6, 7, 9
_END_HEADERS, _ACK = 4, 1
_CANCEL = 8
_FRAME_BYTES = 16384
_WAIT_S = 10.0


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _string(value: str) -> bytes:
    raw = value.encode()
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    rest, out = len(raw) - 127, bytearray((127,))
    while rest >= 128:
        out.append(rest % 128 + 128)
        rest //= 128
    return bytes((*out, rest)) + raw


def header(name: str, value: str) -> bytes:
    """A literal that is never indexed, without Huffman coding."""
    return b"\x10" + _string(name) + _string(value)


def request_headers(path: str) -> bytes:
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "x"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    )
    return b"".join(header(name, value) for name, value in fields)


class Http2Client:
    """One connection; what the server says is read in the background."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._blocks: dict[int, list[bytes]] = {}
        self._news = asyncio.Event()
        self.goaway = False
        self.closed = False
        self._task = asyncio.create_task(self._read())

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, port: int) -> AsyncIterator[Http2Client]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_PREFACE + frame(_SETTINGS, 0, 0))
        client = cls(reader, writer)
        try:
            yield client
        finally:
            client._task.cancel()
            await asyncio.gather(client._task, return_exceptions=True)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _read(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(9)
                kind, flags = head[3], head[4]
                stream = struct.unpack(">I", head[5:])[0] & 0x7FFFFFFF
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                if kind == _SETTINGS and not flags & _ACK:
                    self._writer.write(frame(_SETTINGS, _ACK, 0))
                elif kind == _PING and not flags & _ACK:
                    self._writer.write(frame(_PING, _ACK, 0, payload))
                elif kind == _HEADERS:
                    self._blocks.setdefault(stream, []).append(payload)
                elif kind == _GOAWAY:
                    self.goaway = True
                self._news.set()
        self.closed = True
        self._news.set()

    async def _send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def headers(self, stream: int, path: str) -> None:
        await self._send(frame(_HEADERS, _END_HEADERS, stream, request_headers(path)))

    async def data(self, stream: int, payload: bytes) -> None:
        await self._send(frame(_DATA, 0, stream, payload))

    async def trailers(self, stream: int) -> dict[str, str]:
        """``grpc-status`` of a stream; the server's literals are read only as far as that takes."""
        async with asyncio.timeout(_WAIT_S):
            while not self.closed:
                for block in self._blocks.get(stream, ()):
                    at = block.find(b"grpc-status")
                    if at >= 0:
                        value = block[at + 11 :]
                        return {"grpc-status": value[1 : 1 + (value[0] & 0x7F)].decode()}
                self._news.clear()
                await self._news.wait()
        return {}

    async def endless_headers(self, stream: int, nbytes: int) -> None:
        """One header block in CONTINUATION frames that do not end, until the server has had enough."""
        padding = b"".join(header(f"x-{number}", "y" * 900) for number in range(17))[:_FRAME_BYTES]
        with contextlib.suppress(ConnectionError):
            await self._send(frame(_HEADERS, 0, stream, request_headers("/x")))
            for _ in range(nbytes // len(padding)):
                await self._send(frame(_CONTINUATION, 0, stream, padding))
                if self.closed or self.goaway:
                    return

    async def rapid_reset(self, path: str, count: int) -> None:
        """Open a stream and take it back, again and again."""
        with contextlib.suppress(ConnectionError):
            for number in range(count):
                stream = 2 * number + 1
                opened = frame(_HEADERS, _END_HEADERS, stream, request_headers(path))
                await self._send(opened + frame(_RST_STREAM, 0, stream, struct.pack(">I", _CANCEL)))
                if self.closed or self.goaway:
                    return

    async def ended(self) -> bool:
        """Whether the server has said goodbye or hung up, soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WAIT_S):
                while not (self.closed or self.goaway):
                    self._news.clear()
                    await self._news.wait()
        return self.closed or self.goaway
