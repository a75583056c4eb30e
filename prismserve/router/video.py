"""Videos of a request: MP4 and WebM files or lists of frames become RGB samples with their times.

A file is opened once, here, where bytes, containers, codecs, sizes, frames and seconds are all bounded; workers get
samples and open nothing. Decoding needs PyAV, which is imported when the first video file arrives.
"""

from __future__ import annotations

import io
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from prismserve.core.errors import InvalidRequestError
from prismserve.core.hashing import digest
from prismserve.core.types import FrameTimes, MediaInput, MediaKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import NoReturn

    from prismserve.router.config import RouterConfig

CHANNELS: Final = 3
FPS_MAX: Final = 240.0
_CODECS: Final = frozenset({"h264", "hevc", "mpeg4", "vp8", "vp9", "av1", "libdav1d", "libaom-av1", "libvpx-vp9"})
_EBML: Final = b"\x1a\x45\xdf\xa3"
_HEADER_BYTES: Final = 64
_DECODER_THREADS: Final = 2


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """Which frames of a video are wanted; at most one of the two is set.

    Attributes:
        fps: so many per second, as far as the limit on frames allows.
        num_frames: so many in all, evenly spread; all of a video that has fewer.
    """

    fps: float | None = None
    num_frames: int | None = None


@dataclass(frozen=True, slots=True)
class VideoSource:
    """A video as the caller gave it.

    Attributes:
        content: the file, a data URI of it, or the frames in order: image files or data URIs.
        field: the request field it came from, for error messages.
        choice: which frames are wanted; of a list of frames, ``fps`` says how they were taken.
    """

    content: bytes | str | tuple[bytes | str, ...]
    field: str
    choice: FrameChoice = FrameChoice()

    @property
    def kind(self) -> MediaKind:
        """A video."""
        return MediaKind.VIDEO


def _refuse(field: str, reason: str) -> NoReturn:
    message = f"{field}: {reason}"
    raise InvalidRequestError(message, field=field)


def container_of(data: bytes, field: str) -> str:
    """``mp4`` or ``webm`` by the file's own first bytes; InvalidRequestError for anything else."""
    if data[4:8] == b"ftyp":
        return "mp4"
    if data.startswith(_EBML) and b"webm" in data[:_HEADER_BYTES]:
        return "webm"
    _refuse(field, "not a video that is read here: only MP4 and WebM files are")


def evenly(frames: int, wanted: int) -> list[int]:
    """``wanted`` of ``frames`` indices, evenly spread, first and last among them; all where there are no more."""
    if wanted >= frames:
        return list(range(frames))
    return [int(index) for index in np.linspace(0, frames - 1, wanted).round()]


def wanted_frames(frames: int, seconds: float, choice: FrameChoice, config: RouterConfig) -> int:
    """How many of a video's frames are taken: by number, or by rate; at least 1, at most ``max_video_frames``."""
    if choice.num_frames is not None:
        wanted = choice.num_frames
    else:
        wanted = int(min(seconds * (choice.fps or config.video_fps), config.max_video_frames))
    return max(1, min(wanted, frames, config.max_video_frames))


def scaled_size(width_px: int, height_px: int, pixels_max: int) -> tuple[int, int]:
    """(width, height) of at most ``pixels_max`` pixels in the same proportions, as they are where they fit."""
    if width_px * height_px <= pixels_max:
        return width_px, height_px
    scale = math.sqrt(pixels_max / (width_px * height_px))
    return max(1, int(width_px * scale)), max(1, int(height_px * scale))


def clip_of(frames: Sequence[np.ndarray[Any, Any]], times: FrameTimes) -> MediaInput:
    """Equal frames, uint8 [height, width, 3] each, as a media item; its hash covers shape, times and samples."""
    height, width = frames[0].shape[:2]
    data = b"".join(np.ascontiguousarray(frame).tobytes() for frame in frames)
    shape = np.array([len(frames), height, width], dtype="<u4").tobytes()
    return MediaInput(data, digest("video-pixels", shape, times.packed(), data), width, height, times)


class FrameFitter:
    """Scales frames down so that a video of so many fits its share of a request's bytes."""

    def __init__(self, frames: int, share_bytes: int, config: RouterConfig) -> None:
        """Frames of a video of ``frames``, whose samples may take ``share_bytes``."""
        self._pixels_max = max(1, min(config.video_frame_pixels, share_bytes // (CHANNELS * frames)))

    def __call__(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """The image as uint8 [height, width, 3]."""
        size = scaled_size(*image.size, self._pixels_max)
        plain = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(plain if plain.size == size else plain.resize(size, Image.Resampling.BICUBIC))


class VideoFile:
    """One pass of checks over a container, then one of decoding.

    Args:
        data: the whole file.
        config: limits.
        field: the request field, for error messages.
        check: called with (width, height) before anything is decoded; raises if they are refused.
    """

    def __init__(self, data: bytes, config: RouterConfig, field: str, check: Callable[[int, int], None]) -> None:
        if len(data) > config.max_video_file_bytes:
            _refuse(field, f"the video file takes {len(data)} bytes, at most {config.max_video_file_bytes} are allowed")
        self._format = container_of(data, field)
        self._data, self._config, self._field, self._check = data, config, field, check
        self._deadline = time.monotonic() + config.video_timeout_s

    def read(self, choice: FrameChoice, share_bytes: int) -> MediaInput:
        """Decode the frames that are wanted; InvalidRequestError names the field and the limit or the damage."""
        import av

        try:
            stamps, base = self._stamps()
            start, frames = stamps[0], len(stamps)
            seconds = float((stamps[-1] - start) * base) * frames / max(1, frames - 1)
            if seconds <= 0:
                seconds = frames / self._config.video_fps
            indices = evenly(frames, wanted_frames(frames, seconds, choice, self._config))
            times = FrameTimes(tuple(float((stamps[at] - start) * base) for at in indices), len(indices) / seconds)
            fit = FrameFitter(len(indices), share_bytes, self._config)
            return clip_of(self._decode([stamps[at] for at in indices], fit), times)
        except (av.error.FFmpegError, ValueError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            _refuse(self._field, f"the {self._format} video is damaged and cannot be decoded: {reason}")

    def _open(self) -> tuple[Any, Any]:
        import av

        container = av.open(io.BytesIO(self._data), mode="r", format=self._format, metadata_errors="ignore")
        stream = next(iter(container.streams.video), None)
        if stream is None:
            _refuse(self._field, "the file holds no video stream")
        codec = stream.codec_context
        if codec is None or codec.name not in _CODECS:
            name = "unknown" if codec is None else codec.name
            _refuse(self._field, f"video codec {name!r} is not read; use H.264, HEVC, VP8, VP9 or AV1")
        if not codec.width or not codec.height:
            _refuse(self._field, f"the {self._format} video is damaged: it does not say how large its frames are")
        self._check(codec.width, codec.height)
        # A frame inside the stream may claim another size than the header; the decoder then stops before allocating.
        codec.options = {"max_pixels": str(self._config.max_image_pixels)}
        codec.thread_count = _DECODER_THREADS
        return container, stream

    def _stamps(self) -> tuple[list[int], Any]:
        """Presentation times of all frames, ascending, and their unit in seconds; nothing is decoded."""
        container, stream = self._open()
        with container:
            stamps: list[int] = []
            for packet in container.demux(stream):
                self._in_time()
                if packet.pts is None:
                    continue
                stamps.append(packet.pts)
                if len(stamps) > self._config.max_video_source_frames:
                    limit = self._config.max_video_source_frames
                    _refuse(self._field, f"the video has more than {limit} frames, which is the limit")
            if not stamps or len(stamps) < stream.frames:
                _refuse(self._field, f"the video is truncated: {len(stamps)} of {stream.frames} frames are there")
            return sorted(stamps), stream.time_base

    def _decode(self, wanted: list[int], fit: FrameFitter) -> list[np.ndarray[Any, Any]]:
        container, stream = self._open()
        size = stream.codec_context.width, stream.codec_context.height
        taken: list[np.ndarray[Any, Any]] = []
        with container:
            for frame in container.decode(stream):
                self._in_time()
                if frame.pts is None or frame.pts < wanted[len(taken)]:
                    continue
                if (frame.width, frame.height) != size:
                    _refuse(self._field, f"the video changes its size within, from {size[0]}x{size[1]} pixels")
                taken.append(fit(frame.to_image()))
                if len(taken) == len(wanted):
                    return taken
        _refuse(self._field, f"the video is truncated: {len(taken)} of {len(wanted)} frames could be decoded")

    def _in_time(self) -> None:
        if time.monotonic() > self._deadline:
            limit = f"{self._config.video_timeout_s:g}"
            _refuse(self._field, f"decoding took longer than {limit} seconds, which is the limit; send a shorter video")


def joined_frames(images: Iterable[Image.Image], fields: Sequence[str], fit: FrameFitter, rate: float) -> MediaInput:
    """Frames taken ``rate`` times a second as a media item; InvalidRequestError unless all have one size."""
    first: tuple[int, int] | None = None
    frames: list[np.ndarray[Any, Any]] = []
    for image, field in zip(images, fields, strict=True):
        first = first or image.size
        if image.size != first:
            sizes = f"{image.width}x{image.height} pixels, the first has {first[0]}x{first[1]}"
            _refuse(field, f"this frame has {sizes}; all must have one size")
        frames.append(fit(image))
    return clip_of(frames, FrameTimes(tuple(index / rate for index in range(len(frames))), rate))
