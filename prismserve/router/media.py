"""Images and videos of a request: data URIs, header checks before any decoding, pixel hashes.

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
from typing import TYPE_CHECKING, Final, TypeAlias

from PIL import Image

from prismserve.core.errors import InvalidRequestError
from prismserve.core.hashing import canonical_json, digest
from prismserve.core.types import MediaInput, MediaKind
from prismserve.router.image_header import ImageHeader, read_header
from prismserve.router.video import FPS_MAX, FrameFitter, VideoFile, VideoSource, joined_frames

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.router.config import RouterConfig

_DATA_URI: Final = {kind: re.compile(rf"data:{kind}/[a-zA-Z0-9.+-]{{1,32}};base64,") for kind in MediaKind}
_EXAMPLES: Final = {MediaKind.IMAGE: "image/png", MediaKind.VIDEO: "video/mp4"}
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


Source: TypeAlias = ImageSource | VideoSource


def _check_count(what: str, fields: Sequence[str], limit: int) -> None:
    if len(fields) > limit:
        message = f"{fields[limit]}: at most {limit} {what} per request, got {len(fields)}"
        raise InvalidRequestError(message, field=fields[limit])


def decode_data_uri(uri: str, field: str, kind: MediaKind = MediaKind.IMAGE) -> bytes:
    """The file inside ``data:image/...;base64,...`` (or ``video``); InvalidRequestError for any other URL."""
    if not uri.startswith("data:"):
        message = f"{field}: {kind} URLs are off; send the {kind} as data:{_EXAMPLES[kind]};base64,..."
        raise InvalidRequestError(message, field=field)
    match = _DATA_URI[kind].match(uri)
    if match is None:
        message = f"{field}: a data URI must start with data:{kind}/<type>;base64,"
        raise InvalidRequestError(message, field=field)
    try:
        return base64.b64decode(uri[match.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        message = f"{field}: the data URI does not hold valid base64"
        raise InvalidRequestError(message, field=field) from None


def check_header(header: ImageHeader, config: RouterConfig, field: str) -> None:
    """Refuse an image by its size before it is decoded."""
    check_size(header.width_px, header.height_px, config, field)


def check_size(width: int, height: int, config: RouterConfig, field: str, kind: MediaKind = MediaKind.IMAGE) -> None:
    """Refuse an image or video by its size before it is decoded."""
    size = f"{field}: the {kind} is {width}x{height} pixels;"
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


def read_video(source: VideoSource, data: Sequence[bytes], share_bytes: int, config: RouterConfig) -> MediaInput:
    """Validate, decode and hash one video.

    Args:
        source: what was asked for.
        data: its file, or its frames.
        share_bytes: what its samples may take.
        config: limits.

    Raises:
        InvalidRequestError: naming the field and the reason.
    """
    if not isinstance(source.content, tuple):

        def check(width: int, height: int) -> None:
            check_size(width, height, config, source.field, MediaKind.VIDEO)

        return VideoFile(data[0], config, source.field, check).read(source.choice, share_bytes)
    fields = [f"{source.field}[{index}]" for index in range(len(data))]
    frames = (_frame(file, config, field) for file, field in zip(data, fields, strict=True))
    fit = FrameFitter(len(data), share_bytes, config)
    return joined_frames(frames, fields, fit, source.choice.fps or config.video_fps)


def _frame(data: bytes, config: RouterConfig, field: str) -> Image.Image:
    read_image(data, config, field)
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


class MediaReader:
    """Reads the images and videos of requests in its own threads.

    Remembers the hashes of image files it has seen, and the last videos.

    Args:
        config: limits, number of threads and size of the memory.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._pool = ThreadPoolExecutor(config.media_threads, thread_name_prefix="router-media")
        self._known: OrderedDict[bytes, tuple[bytes, int, int]] = OrderedDict()
        self._videos: OrderedDict[bytes, MediaInput] = OrderedDict()
        self._video_bytes = 0
        self.decoded_images = 0
        self.remembered_images = 0
        self.decoded_videos = 0
        self.remembered_videos = 0

    async def read(self, sources: Sequence[Source]) -> tuple[MediaInput, ...]:
        """Validate all images and videos of one request, in order; counts are checked before anything is decoded."""
        videos = [source for source in sources if isinstance(source, VideoSource)]
        images = [source for source in sources if isinstance(source, ImageSource)]
        _check_count("images", [source.field for source in images], self._config.max_images)
        _check_count("videos", [source.field for source in videos], self._config.max_videos)
        for source in videos:
            self._check_choice(source)
        share_bytes = self._config.max_video_bytes // max(1, len(videos))
        return tuple(
            [
                await (self._video(source, share_bytes) if isinstance(source, VideoSource) else self._image(source))
                for source in sources
            ]
        )

    async def _image(self, source: ImageSource) -> MediaInput:
        loop = asyncio.get_running_loop()
        data, name = await loop.run_in_executor(self._pool, self._unwrap, source)
        known = self._known.get(name)
        if known is None:
            item = await loop.run_in_executor(self._pool, read_image, data, self._config, source.field)
            self.decoded_images += 1
        else:
            item = MediaInput(data, *known)
            self.remembered_images += 1
        self._remember(name, item)
        return item

    def _check_choice(self, source: VideoSource) -> None:
        limit, frames = self._config.max_video_frames, source.content
        if isinstance(frames, tuple) and source.choice.num_frames is not None:
            message = f"{source.field}: num_frames is for video files; a list of frames is taken as it is"
        elif isinstance(frames, tuple) and not frames:
            message = f"{source.field}: must hold at least one frame"
        elif isinstance(frames, tuple) and len(frames) > limit:
            message = f"{source.field}: has {len(frames)} frames, at most {limit} are allowed"
        elif source.choice.num_frames is not None and not 1 <= source.choice.num_frames <= limit:
            message = f"{source.field}: num_frames must be between 1 and {limit}"
        elif source.choice.fps is not None and not 0 < source.choice.fps <= FPS_MAX:
            message = f"{source.field}: fps must be above 0 and at most {FPS_MAX:g}"
        elif source.choice.fps is not None and source.choice.num_frames is not None:
            message = f"{source.field}: give fps or num_frames, not both"
        else:
            return
        raise InvalidRequestError(message, field=source.field)

    async def _video(self, source: VideoSource, share_bytes: int) -> MediaInput:
        loop = asyncio.get_running_loop()
        data, name = await loop.run_in_executor(self._pool, self._unwrap_video, source, share_bytes)
        known = self._videos.get(name)
        if known is not None:
            self._videos.move_to_end(name)
            self.remembered_videos += 1
            return known
        item = await loop.run_in_executor(self._pool, read_video, source, data, share_bytes, self._config)
        self.decoded_videos += 1
        if len(item.data) <= self._config.video_cache_bytes and name not in self._videos:
            self._videos[name] = item
            self._video_bytes += len(item.data)
            while self._video_bytes > self._config.video_cache_bytes:
                self._video_bytes -= len(self._videos.popitem(last=False)[1].data)
        return item

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _unwrap(source: ImageSource) -> tuple[bytes, bytes]:
        content = source.content
        data = decode_data_uri(content, source.field) if isinstance(content, str) else content
        return data, digest("image-file", data)

    @staticmethod
    def _unwrap_video(source: VideoSource, share_bytes: int) -> tuple[list[bytes], bytes]:
        """The files, and a name for what is made of them."""
        single = not isinstance(source.content, tuple)
        kind = MediaKind.VIDEO if single else MediaKind.IMAGE
        parts = (source.content,) if not isinstance(source.content, tuple) else source.content
        data = [
            part
            if isinstance(part, bytes)
            else decode_data_uri(part, source.field if single else f"{source.field}[{i}]", kind)
            for i, part in enumerate(parts)
        ]
        choice = canonical_json([single, source.choice.fps, source.choice.num_frames, share_bytes])
        return data, digest("video-file", choice, *data)

    def _remember(self, name: bytes, item: MediaInput) -> None:
        self._known[name] = (item.pixel_hash, item.width_px, item.height_px)
        self._known.move_to_end(name)
        if len(self._known) > self._config.image_hash_entries:
            self._known.popitem(last=False)
