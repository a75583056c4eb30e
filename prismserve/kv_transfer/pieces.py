"""Pieces of KV on their way out, and how several of them become one write."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from prismserve.compression import loader
from prismserve.compression.base import EncodesParts
from prismserve.compression.wire import Slots, runs, table
from prismserve.core.errors import TransferError
from prismserve.core.types import KVLayout, MethodSpec, Payload
from prismserve.kv_transfer.plan import RAW_LAYER, aligned, cut
from prismserve.kv_transfer.wire import PAYLOADS_MAX, Checksum


class KVRead(Protocol):
    """Fetches what a piece holds; runs on the send thread."""

    def __call__(self, layer: int, start_token: int, tokens: int, *, rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer.

        Args:
            layer: decoder layer.
            start_token: first cache slot.
            tokens: slots.
            rows: whether the codec moves what lies in memory rather than numbers that it rounds.

        Returns:
            Two [tokens, kv_heads, head_dim]; with ``rows`` and a quantised layout, uint8 [tokens, kv_heads, row_bytes].
        """
        ...


@dataclass(slots=True)
class Piece:
    """What becomes one payload; ``offset_bytes`` is set when it is first staged and kept over retries."""

    layer: int
    start_token: int
    tokens: int
    nbytes: int
    codec: int = 0
    read: KVRead | None = None
    raw: torch.Tensor | None = None
    offset_bytes: int = -1
    attempts: int = 0
    not_before_s: float = 0.0
    payload: Payload | None = None


@dataclass(slots=True)
class Batch:
    """Pieces that lie side by side in the receiver's extent and leave as one write."""

    pieces: list[Piece]

    @property
    def offset_bytes(self) -> int:
        """Where the write starts."""
        return self.pieces[0].offset_bytes

    @property
    def nbytes(self) -> int:
        """How long it is, alignment between pieces included."""
        return self.pieces[-1].offset_bytes + self.pieces[-1].nbytes - self.offset_bytes

    @property
    def payloads(self) -> list[Payload]:
        """What the pieces have become; TransferError before they were encoded."""
        found = [piece.payload for piece in self.pieces if piece.payload is not None]
        if len(found) != len(self.pieces):
            message = "a piece was submitted before it was encoded"
            raise TransferError(message)
        return found


class Cutter:
    """Cuts what is pushed into pieces, and encodes them.

    Args:
        codec: normalised spec of the transfer; UnknownMethodError if there is no such codec.
        layout: of the KV.
        bytes_max: longest piece before encoding.
    """

    def __init__(self, codec: MethodSpec, layout: KVLayout, bytes_max: int) -> None:
        self._spec = codec
        self._codecs = [(loader.codec(spec.name), loader.config_of(spec, "codec")) for spec in table(codec)]
        self._layout = layout
        self._bytes_max = bytes_max

    def kv(self, layer: int, start: int, tokens: int, read: KVRead, slots: Slots | None) -> Iterator[Piece]:
        """Pieces of one run of slots of one layer."""
        for first, count, place in runs(self._spec, slots, start, tokens):
            codec, config = self._codecs[place]
            for at, length in cut(first, count, self._layout.token_layer_bytes, self._bytes_max):
                nbytes = codec.encoded_bytes(length, self._layout, config)
                yield Piece(layer, at, length, nbytes, place, read)

    def raw(self, start_token: int, tokens: torch.Tensor) -> Iterator[Piece]:
        """Pieces of rows that travel as they are."""
        data = tokens.contiguous().view(torch.uint8).reshape(-1)
        row_bytes = data.numel() // max(1, tokens.shape[0])
        for first, length in cut(0, tokens.shape[0], max(1, row_bytes), self._bytes_max):
            rows = data[first * row_bytes : (first + length) * row_bytes]
            yield Piece(RAW_LAYER, start_token + first, length, rows.numel(), raw=rows)

    def encode(self, batch: Batch, out: torch.Tensor) -> None:
        """Fill a staged buffer and give every piece its payload.

        Args:
            batch: pieces with their places.
            out: uint8 [batch.nbytes].
        """
        reached = 0
        for piece in batch.pieces:
            start = piece.offset_bytes - batch.offset_bytes
            out[reached:start].zero_()  # staging memory holds what an earlier transfer left there
            reached = start + piece.nbytes
            digest = self._encode(piece, out[start:reached])
            piece.payload = Payload(
                piece.layer, piece.start_token, piece.tokens, piece.offset_bytes, piece.nbytes, digest, piece.codec
            )

    def _encode(self, piece: Piece, out: torch.Tensor) -> bytes:
        """The checksum is over private bytes: what is staged may be memory that a late writer of the peer's can reach."""
        if piece.raw is not None:
            return _place([piece.raw], out)
        if piece.read is None:
            message = "a piece has nothing to send"
            raise TransferError(message)
        codec, config = self._codecs[piece.codec]
        keys, values = piece.read(piece.layer, piece.start_token, piece.tokens, rows=not codec.lossy)
        if isinstance(codec, EncodesParts):
            return _place(codec.parts(keys, values, config), out)
        return _place([codec.encode(keys, values, config)], out)


def _place(parts: Sequence[torch.Tensor], out: torch.Tensor) -> bytes:
    """Copy the parts' bytes into ``out``, which they fill; their checksum."""
    digest, at = Checksum(), 0
    for part in parts:
        data = part.detach().cpu().reshape(-1).view(torch.uint8)
        digest.update(data.numpy())
        out[at : at + data.numel()].copy_(data)
        at += data.numel()
    if at != out.numel():
        message = f"a codec encoded {at} bytes where it had announced {out.numel()}"
        raise TransferError(message)
    return digest.digest()


def gather(queue: deque[Piece], cursor: int, room: int, coalesce_bytes: int, now_s: float) -> tuple[Batch | None, int]:
    """The pieces at the head of a queue that can leave as one write, placed; they stay in the queue.

    Args:
        queue: in order.
        cursor: where the next piece that has no place yet goes, in bytes of the extent.
        room: bytes of the extent.
        coalesce_bytes: pieces are added while the write is no longer than this.
        now_s: pieces that wait for a retry stay behind, with all that follow.

    Returns:
        The batch, None if nothing may leave now, and the new cursor.

    Raises:
        TransferError: the extent is too small.
    """
    taken: list[Piece] = []
    end = 0
    for piece in queue:
        if now_s < piece.not_before_s or len(taken) == PAYLOADS_MAX:
            break
        placed = piece.offset_bytes >= 0
        offset = piece.offset_bytes if placed else cursor
        if taken and (offset != aligned(end) or offset + piece.nbytes - taken[0].offset_bytes > coalesce_bytes):
            break
        if offset + piece.nbytes > room:
            if taken:
                break
            message = f"the reservation of {room} bytes is too small: {offset + piece.nbytes} bytes are needed"
            raise TransferError(message)
        if not placed:
            piece.offset_bytes = offset
            cursor = aligned(offset + piece.nbytes)
        end = offset + piece.nbytes
        taken.append(piece)
    return (Batch(taken) if taken else None), cursor
