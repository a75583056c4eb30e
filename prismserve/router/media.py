"""Images of a request: data URIs, header checks before any decoding, pixel hashes.

Nothing is decoded before format, size, completeness and animation have been read from the header by
:func:`prismserve.router.image_header.read_header`. Pixels are hashed over mode, shape and content, so that the same
bytes read as 30x100 and as 100x30 differ.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import struct
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from PIL import Image

from prismserve.core.errors import InvalidRequestError
from prismserve.core.hashing import digest
from prismserve.core.types import MediaInput, MediaKind
from prismserve.router.image_header import ImageHeader, read_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.router.config import RouterConfig

_DATA_URI: Final = re.compile(r"data:image/[a-zA-Z0-9.+-]{1,32};base64,")
_EXIF_ORIENTATION: Final = 0x0112
_PLAIN_MODES: Final = frozenset({"1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"})
_PALETTE_MODES: Final = frozenset({"P", "PA"})
# What Pillow's decoders raise on malformed files; it documents no common base.
_DECODE_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image as the caller gave it.

    Attributes:
        content: the encoded file, or a data URI.
        field: the request field it came from, for error messages.
    """

    content: bytes | str
    field: str

    @property
    def kind(self) -> MediaKind:
        """An image."""
        return MediaKind.IMAGE


def decode_data_uri(uri: str, field: str) -> bytes:
    """The file inside ``data:image/...;base64,...``; InvalidRequestError for any other URL."""
    if not uri.startswith("data:"):
        message = f"{field}: image URLs are off; send the image as data:image/png;base64,..."
        raise InvalidRequestError(message, field=field)
    match = _DATA_URI.match(uri)
    if match is None:
        message = f"{field}: a data URI must start with data:image/<type>;base64,"
        raise InvalidRequestError(message, field=field)
    try:
        return base64.b64decode(uri[match.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        message = f"{field}: the data URI does not hold valid base64"
        raise InvalidRequestError(message, field=field) from None


def check_header(header: ImageHeader, config: RouterConfig, field: str) -> None:
    """Refuse an image by its size before it is decoded."""
    width, height = header.width_px, header.height_px
    size = f"{field}: the image is {width}x{height} pixels;"
    longest, shortest = max(width, height), min(width, height)
    if shortest < config.min_image_side_px:
        message = f"{size} each side must have at least {config.min_image_side_px}"
    elif longest > config.max_image_side_px:
        message = f"{size} no side may have more than {config.max_image_side_px}"
    elif width * height > config.max_image_pixels:
        message = f"{size} at most {config.max_image_pixels} pixels are allowed"
    elif longest > config.max_image_aspect_ratio * shortest:
        message = f"{size} the aspect ratio may be at most {config.max_image_aspect_ratio}:1"
    else:
        return
    raise InvalidRequestError(message, field=field)


def pixel_hash(image: Image.Image) -> bytes:
    """32 bytes over mode, shape and pixels of a decoded image, and its EXIF orientation.

    Palette images are hashed as RGBA, so that equal indices under different palettes differ.
    """
    plain = image if image.mode in _PLAIN_MODES else image.convert("RGBA")
    orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1) or 1)
    shape = struct.pack("<III", plain.width, plain.height, orientation & 0xFFFFFFFF)
    return digest("pixels", plain.mode.encode(), shape, plain.tobytes())


def read_image(data: bytes, config: RouterConfig, field: str) -> MediaInput:
    """Validate, decode and hash one image; InvalidRequestError names the field and the reason."""
    header = read_header(data, field)
    check_header(header, config, field)
    message = f"{field}: the {header.format} image is damaged and cannot be decoded"
    try:
        with Image.open(io.BytesIO(data), formats=[header.format]) as image:
            # A JPEG may carry previews as further frames; the first one is the image.
            frames = 1 if header.format == "JPEG" else getattr(image, "n_frames", 1)
            if image.size != (header.width_px, header.height_px) or frames != 1:
                raise InvalidRequestError(message, field=field)
            if image.mode not in _PLAIN_MODES | _PALETTE_MODES:
                unusual = f"{field}: pixel format {image.mode} is not supported; use 8-bit RGB, RGBA or greyscale"
                raise InvalidRequestError(unusual, field=field)
            image.load()
            hashed = pixel_hash(image)
    except _DECODE_ERRORS:
        raise InvalidRequestError(message, field=field) from None
    return MediaInput(data, hashed, header.width_px, header.height_px)


class MediaReader:
    """Reads the images of requests in its own threads; remembers the hashes of files it has seen.

    Args:
        config: limits, number of threads and size of the memory.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._pool = ThreadPoolExecutor(config.media_threads, thread_name_prefix="router-media")
        self._known: OrderedDict[bytes, tuple[bytes, int, int]] = OrderedDict()
        self.decoded_images = 0
        self.remembered_images = 0

    async def read(self, sources: Sequence[ImageSource]) -> tuple[MediaInput, ...]:
        """Validate all images of one request, in order; the count is checked before anything is decoded."""
        if len(sources) > self._config.max_images:
            field = sources[self._config.max_images].field
            message = f"{field}: at most {self._config.max_images} images per request, got {len(sources)}"
            raise InvalidRequestError(message, field=field)
        loop = asyncio.get_running_loop()
        media = []
        for source in sources:
            data, name = await loop.run_in_executor(self._pool, self._unwrap, source)
            known = self._known.get(name)
            if known is None:
                item = await loop.run_in_executor(self._pool, read_image, data, self._config, source.field)
                self.decoded_images += 1
            else:
                item = MediaInput(data, *known)
                self.remembered_images += 1
            self._remember(name, item)
            media.append(item)
        return tuple(media)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _unwrap(source: ImageSource) -> tuple[bytes, bytes]:
        content = source.content
        data = decode_data_uri(content, source.field) if isinstance(content, str) else content
        return data, digest("image-file", data)

    def _remember(self, name: bytes, item: MediaInput) -> None:
        self._known[name] = (item.pixel_hash, item.width_px, item.height_px)
        self._known.move_to_end(name)
        if len(self._known) > self._config.image_hash_entries:
            self._known.popitem(last=False)
