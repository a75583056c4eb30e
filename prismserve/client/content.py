"""What a caller may put in a conversation, and how it becomes protobuf messages. Pure but for reading image files."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from prismserve.client.errors import RequestError
from prismserve.protocol import prismserve_pb2 as pb

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

IMAGE_BYTES_MAX: Final = 64 << 20
_DATA_URI: Final = "data:"


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a message.

    Attributes:
        source: path of a PNG, JPEG or WebP file, the bytes of one, or a ``PIL.Image.Image`` (sent as PNG).
    """

    source: ImageSource


@dataclass(frozen=True, slots=True)
class Video:
    """One video of a message.

    Attributes:
        source: path of an MP4 or WebM file, the bytes of one, or its frames in order, each as an :class:`Image` has it.
        fps: frames taken of a file per second, at most 240; of a list of frames, how they were taken.
        num_frames: frames taken of a file, evenly spread; not with ``fps``. The server decides where both are None.
    """

    source: VideoSource
    fps: float | None = None
    num_frames: int | None = None


ImageSource: TypeAlias = "str | Path | bytes | PillowImage"
VideoSource: TypeAlias = "str | Path | bytes | Sequence[ImageSource]"
Content: TypeAlias = "str | Sequence[str | Image | Video | Mapping[str, Any]]"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: text, or text, images and videos in order.
    """

    role: str
    content: Content


Conversation: TypeAlias = "str | Sequence[Message | Mapping[str, Any]]"
"""A question, or turns; a turn is a :class:`Message` or a mapping in the shape of OpenAI's API."""


def messages_of(
    conversation: Conversation, images: Sequence[ImageSource] = (), videos: Sequence[VideoSource | Video] = ()
) -> list[pb.Message]:
    """Build the messages of a request.

    Args:
        conversation: a question (one user turn) or the turns.
        images: put before the text of the last user turn.
        videos: put there too, behind the images.

    Raises:
        RequestError: names the field that is malformed.
    """
    turns = [Message("user", conversation)] if isinstance(conversation, str) else list(conversation)
    if not turns:
        message = "messages: at least one message is needed"
        raise RequestError(message, field="messages")
    built = [_message(turn, f"messages[{index}]") for index, turn in enumerate(turns)]
    field = "images" if images else "videos"
    if images or videos:
        user = next((message for message in reversed(built) if message.role == "user"), None)
        if user is None:
            message = f"{field}: there is no user message to put them in"
            raise RequestError(message, field=field)
        parts = [pb.ContentPart(image=encode_image(image, f"images[{index}]")) for index, image in enumerate(images)]
        clips = [video if isinstance(video, Video) else Video(video) for video in videos]
        parts += [pb.ContentPart(video=encode_video(clip, f"videos[{i}]")) for i, clip in enumerate(clips)]
        content = [*parts, *user.content]
        del user.content[:]
        user.content.extend(content)
    return built


def encode_image(source: ImageSource, field: str = "image") -> bytes:
    """The encoded file of an image, at most 64 MiB; RequestError names ``field`` when there is none to send."""
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, (str, Path)):
        data = _read(Path(source), field)
    elif hasattr(source, "save"):
        stream = io.BytesIO()
        source.save(stream, format="PNG")
        data = stream.getvalue()
    else:
        message = f"{field}: an image is a path, bytes or a PIL image, not {type(source).__name__}"
        raise RequestError(message, field=field)
    if not data:
        message = f"{field}: the image is empty"
        raise RequestError(message, field=field)
    if len(data) > IMAGE_BYTES_MAX:
        message = f"{field}: the image takes {len(data)} bytes, the limit is {IMAGE_BYTES_MAX}"
        raise RequestError(message, field=field)
    return data


def encode_video(video: Video, field: str = "video") -> pb.Video:
    """A video on the wire; RequestError names ``field`` when there is none to send."""
    source = video.source
    try:
        if isinstance(source, (str, Path)):
            message = pb.Video(file=_read(Path(source), field), fps=video.fps, num_frames=video.num_frames)
        elif isinstance(source, bytes):
            message = pb.Video(file=source, fps=video.fps, num_frames=video.num_frames)
        else:
            frames = [encode_image(frame, f"{field}[{index}]") for index, frame in enumerate(source)]
            message = pb.Video(frames=frames, fps=video.fps, num_frames=video.num_frames)
    except (TypeError, ValueError) as error:
        text = f"{field}: a video is a path, bytes or a list of images, fps a number, num_frames an integer: {error}"
        raise RequestError(text, field=field) from None
    size = len(message.file) + sum(len(frame) for frame in message.frames)
    if not size or size > IMAGE_BYTES_MAX:
        text = (
            f"{field}: the video takes {size} bytes, the limit is {IMAGE_BYTES_MAX}" if size else f"{field}: is empty"
        )
        raise RequestError(text, field=field)
    return message


def _read(path: Path, field: str) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(IMAGE_BYTES_MAX + 1)
    except OSError as error:
        message = f"{field}: {path} cannot be read: {(error.strerror or str(error)).lower()}"
        raise RequestError(message, field=field) from None


def _message(turn: object, field: str) -> pb.Message:
    role: object
    content: object
    if isinstance(turn, Message):
        role, content = turn.role, turn.content
    elif isinstance(turn, Mapping) and {"role", "content"} == set(turn):
        role, content = turn["role"], turn["content"]
    else:
        message = f"{field}: a message is a Message or a mapping with exactly role and content"
        raise RequestError(message, field=field)
    if not isinstance(role, str) or not role:
        message = f"{field}.role: must be a non-empty string"
        raise RequestError(message, field=f"{field}.role")
    parts: object = [content] if isinstance(content, (str, Image, Video)) else content
    if not isinstance(parts, (list, tuple)):
        message = f"{field}.content: must be text or a list of parts"
        raise RequestError(message, field=f"{field}.content")
    built = [_part(part, f"{field}.content[{index}]") for index, part in enumerate(parts)]
    return pb.Message(role=role, content=built)


def _part(part: object, field: str) -> pb.ContentPart:
    if isinstance(part, str):
        return pb.ContentPart(text=part)
    if isinstance(part, Image):
        return pb.ContentPart(image=encode_image(part.source, field))
    if isinstance(part, Video):
        return pb.ContentPart(video=encode_video(part, field))
    if isinstance(part, Mapping):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return pb.ContentPart(text=part["text"])
        if part.get("type") == "image_url":
            nested = part.get("image_url")
            url = nested.get("url") if isinstance(nested, Mapping) else nested
            if isinstance(url, str):
                return pb.ContentPart(image=_data_uri(url, f"{field}.image_url.url"))
    message = f"{field}: a part is text, an Image, a Video, or a mapping of type text or image_url"
    raise RequestError(message, field=field)


def _data_uri(url: str, field: str) -> bytes:
    header, comma, body = url.partition(",")
    if not url.startswith(_DATA_URI) or not comma or not header.endswith(";base64"):
        message = f"{field}: must be a base64 data URI (data:image/png;base64,...)"
        raise RequestError(message, field=field)
    try:
        return encode_image(base64.b64decode(body, validate=True), field)
    except binascii.Error as error:
        message = f"{field}: not base64: {error}"
        raise RequestError(message, field=field) from None
