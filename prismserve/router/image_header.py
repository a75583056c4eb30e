"""Read format and size of PNG, JPEG and WebP files without decoding them; refuse what is not exactly one still image.

Sources: PNG (W3C, third edition) chunks; JPEG (ITU-T T.81) markers; WebP container (RFC 9649).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from prismserve.core.errors import InvalidRequestError

_PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC: Final = b"\xff\xd8\xff"
_PNG_CHUNKS_MAX: Final = 65_536
_JPEG_SEGMENTS_MAX: Final = 65_536
_JPEG_SCANS_MAX: Final = 100
_SCAN_END: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_SOF: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ANIMATION_FLAG: Final = 0x02


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header of an image file says. ``format`` is Pillow's name: PNG, JPEG or WEBP."""

    format: str
    width_px: int
    height_px: int


class _BadImageError(Exception):
    """Why a file is refused; becomes InvalidRequestError with the field in front."""


def read_header(data: bytes, field: str) -> ImageHeader:
    """Format and size of an encoded image.

    Args:
        data: the whole file.
        field: the request field, for error messages.

    Raises:
        InvalidRequestError: not PNG, JPEG or WebP, animated, cut short, or followed by something else.
    """
    try:
        if data.startswith(_PNG_MAGIC):
            return _png(data)
        if data.startswith(_JPEG_MAGIC):
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        reason = "not an image: only PNG, JPEG and WebP files are read"
    except _BadImageError as error:
        reason = str(error)
    except (struct.error, IndexError):
        reason = "the image is truncated"
    message = f"{field}: {reason}"
    raise InvalidRequestError(message, field=field) from None


def _png(data: bytes) -> ImageHeader:
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length != 13:
        reason = "the PNG does not start with an IHDR chunk"
        raise _BadImageError(reason)
    at = len(_PNG_MAGIC)
    for _ in range(_PNG_CHUNKS_MAX):
        length, kind = struct.unpack_from(">I4s", data, at)
        at += 12 + length
        if at > len(data):
            reason = "the PNG is truncated"
            raise _BadImageError(reason)
        if kind == b"acTL":
            reason = "the PNG is animated; send one still image"
            raise _BadImageError(reason)
        if kind == b"IEND":
            if at != len(data):
                reason = "the PNG is followed by other data"
                raise _BadImageError(reason)
            return ImageHeader("PNG", width, height)
    reason = "the PNG has too many chunks"
    raise _BadImageError(reason)


def _jpeg(data: bytes) -> ImageHeader:
    at, scans = 2, 0
    size: tuple[int, int] | None = None
    for _ in range(_JPEG_SEGMENTS_MAX):
        while data[at] == 0xFF and data[at + 1] == 0xFF:
            at += 1
        if data[at] != 0xFF:
            reason = "the JPEG is malformed"
            raise _BadImageError(reason)
        marker = data[at + 1]
        if marker == 0xD9:
            return _jpeg_end(data, at + 2, size)
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker in _SOF:
            if size is not None:
                reason = "the JPEG has more than one frame"
                raise _BadImageError(reason)
            height, width = struct.unpack_from(">HH", data, at + 5)
            size = (width, height)
        at += 2 + length
        if marker == 0xDA:
            scans += 1
            found = _SCAN_END.search(data, at)
            if found is None:
                reason = "the JPEG is truncated"
                raise _BadImageError(reason)
            at = found.start()
            if scans > _JPEG_SCANS_MAX:
                reason = f"the JPEG has more than {_JPEG_SCANS_MAX} scans"
                raise _BadImageError(reason)
    reason = "the JPEG has too many segments"
    raise _BadImageError(reason)


def _jpeg_end(data: bytes, at: int, size: tuple[int, int] | None) -> ImageHeader:
    # Cameras pad with zeros or append further JPEGs (previews, gain maps); anything else is another file.
    rest = data[at : at + 4096].lstrip(b"\0")
    if rest and not rest.startswith(_JPEG_MAGIC):
        reason = "the JPEG is followed by other data"
        raise _BadImageError(reason)
    if size is None:
        reason = "the JPEG holds no frame"
        raise _BadImageError(reason)
    return ImageHeader("JPEG", *size)


def _webp(data: bytes) -> ImageHeader:
    (riff,) = struct.unpack_from("<I", data, 4)
    end = 8 + riff + (riff & 1)
    if len(data) < 8 + riff:
        reason = "the WebP is truncated"
        raise _BadImageError(reason)
    if len(data) > end:
        reason = "the WebP is followed by other data"
        raise _BadImageError(reason)
    kind = data[12:16]
    if kind == b"VP8X":
        if data[20] & _ANIMATION_FLAG:
            reason = "the WebP is animated; send one still image"
            raise _BadImageError(reason)
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        if len(data) < 30:
            raise IndexError
        return ImageHeader("WEBP", width, height)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageHeader("WEBP", 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF))
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader("WEBP", width & 0x3FFF, height & 0x3FFF)
    reason = "the WebP holds no image"
    raise _BadImageError(reason)
