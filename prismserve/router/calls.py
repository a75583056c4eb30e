"""What a caller asked for, the same for HTTP and gRPC, and how OpenAI's bodies turn into it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from prismserve.core.errors import NotFoundError
from prismserve.models.processing import ChatMessage, ImageSlot, VideoSlot
from prismserve.router.fields import array, mapping, refuse, text
from prismserve.router.media import ImageSource, Source
from prismserve.router.tenants import EVERYONE, Tenant
from prismserve.router.video import FPS_MAX, FrameChoice, VideoSource

if TYPE_CHECKING:
    from prismserve.models.processing import Part
    from prismserve.router.config import RouterConfig

_ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_JPEG_FRAMES: Final = "data:video/jpeg;base64,"
_TOOL_FIELDS: Final = ("tool_calls", "function_call", "audio")

CompressionField: TypeAlias = str | Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Call:
    """One request before anything is decoded or tokenized.

    Exactly one of ``messages``, ``prompt`` and ``prompt_ids`` is set.

    Attributes:
        media: in the order of the slots in ``messages``.
        options: the fields read by :func:`prismserve.router.sampling.parse_sampling`.
        compression: preset name, method name, object, or None for the server's default; untrusted.
        tenant: whose request it is; derived from the credential, never from the body. Only within it are caches shared.
        cache_salt: separates caches within the tenant.
        timeout_s: what the caller allows, if less than the server's limit.
    """

    options: Mapping[str, Any]
    messages: tuple[ChatMessage, ...] | None = None
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    media: tuple[Source, ...] = ()
    compression: CompressionField = None
    cache_salt: str = ""
    tenant: Tenant = EVERYONE
    timeout_s: float | None = None


def check_model(name: Any, served: str) -> None:
    """NotFoundError unless ``name`` is empty, absent or the served model's name."""
    if name is None or name == "":
        return
    if text(name, "model", chars_max=512) != served:
        message = f"the model {name!r} is not served here; this server has {served!r}"
        raise NotFoundError(message, field="model")


def check_cache_salt(value: Any, config: RouterConfig) -> str:
    """A short string without NUL; "" if absent."""
    if value is None:
        return ""
    salt = text(value, "cache_salt", chars_max=config.max_cache_salt_chars)
    if "\0" in salt:
        refuse("cache_salt", "must not hold a NUL character")
    return salt


def check_request_id(value: str) -> str:
    """A caller's request id: letters, digits, ``-``, ``_``, ``.``, at most 128; "" if none."""
    if value and not _REQUEST_ID.fullmatch(value):
        refuse("request_id", "must be 1 to 128 letters, digits, '-', '_' or '.'")
    return value


def check_compression(value: Any) -> CompressionField:
    """A name or an object; what they mean is decided by the presets."""
    if value is not None and not isinstance(value, str | dict):
        refuse("compression", "must be a name or an object")
    return value


def _choice(options: Mapping[str, Any], field: str) -> FrameChoice:
    fps, count = options.get("fps"), options.get("num_frames")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= FPS_MAX):
        refuse(f"{field}.fps", f"must be a number above 0 and at most {FPS_MAX:g}")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
        refuse(f"{field}.num_frames", "must be an integer")
    return FrameChoice(None if fps is None else float(fps), count)


def _video_url_part(part: Mapping[str, Any], field: str) -> VideoSource:
    """A file as a data URI; or, as vLLM has it, JPEG frames in one ``data:video/jpeg`` URI with commas between."""
    value = part.get("video_url")
    options = value if isinstance(value, dict) else {}
    url = options.get("url") if isinstance(value, dict) else value
    where = f"{field}.video_url.url"
    if not isinstance(url, str):
        refuse(where, "must be a string")
    choice = _choice({**part, **options}, f"{field}.video_url")
    if not url.startswith(_JPEG_FRAMES):
        return VideoSource(url, where, choice)
    frames = tuple(f"data:image/jpeg;base64,{frame}" for frame in url[len(_JPEG_FRAMES) :].split(","))
    return VideoSource(frames, where, choice)


def _video_part(part: Mapping[str, Any], field: str) -> VideoSource:
    """Frames in order, as a list of image data URIs."""
    where = f"{field}.video"
    frames = array(part.get("video"), where)
    for index, frame in enumerate(frames):
        if not isinstance(frame, str):
            refuse(f"{where}[{index}]", "must be a string")
    return VideoSource(tuple(frames), where, _choice(part, field))


_VIDEO_PARTS: Final = {"video_url": _video_url_part, "video": _video_part}


def _image_part(part: Mapping[str, Any], field: str) -> ImageSource:
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, dict) else value
    where = f"{field}.image_url.url"
    if not isinstance(url, str):
        refuse(where, "must be a string")
    return ImageSource(url, where)


def _parts(content: Any, field: str, media: list[Source]) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (text(content, field),)
    parts: list[Part] = []
    for index, item in enumerate(array(content, field)):
        where = f"{field}[{index}]"
        part = mapping(item, where)
        kind = part.get("type")
        if kind == "text":
            parts.append(text(part.get("text"), f"{where}.text"))
        elif kind == "image_url":
            parts.append(ImageSlot(len(media)))
            media.append(_image_part(part, where))
        elif kind in _VIDEO_PARTS:
            parts.append(VideoSlot(len(media)))
            media.append(_VIDEO_PARTS[kind](part, where))
        elif isinstance(kind, str) and kind:
            refuse(f"{where}.type", f"{kind[:32]!r} is not supported; use text, image_url, video_url or video")
        else:
            refuse(f"{where}.type", "must be text, image_url, video_url or video")
    return tuple(parts)


def chat_call(body: Mapping[str, Any], config: RouterConfig, tenant: Tenant) -> Call:
    """Read the body of ``/v1/chat/completions``; InvalidRequestError names the field at fault."""
    messages: list[ChatMessage] = []
    media: list[Source] = []
    items = array(body.get("messages"), "messages", items_max=config.max_messages)
    if not items:
        refuse("messages", "must hold at least one message")
    for index, item in enumerate(items):
        field = f"messages[{index}]"
        message = mapping(item, field)
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            refuse(f"{field}.role", f"must be one of {', '.join(_ROLES)}")
        for name in _TOOL_FIELDS:
            if message.get(name):
                refuse(f"{field}.{name}", "is not supported")
        content = message.get("content")
        if content is None and role == "assistant":
            content = ""
        before = len(media)
        parts = _parts(content, f"{field}.content", media)
        if len(media) > before and role != "user":
            refuse(f"{field}.content", f"only user messages may hold {media[-1].kind}s, not {role}")
        messages.append(ChatMessage(_ROLES[role], parts))
    return Call(
        options=body,
        messages=tuple(messages),
        media=tuple(media),
        compression=check_compression(body.get("compression")),
        cache_salt=check_cache_salt(body.get("cache_salt"), config),
        tenant=tenant,
    )


def completion_call(body: Mapping[str, Any], config: RouterConfig, vocab_size: int, tenant: Tenant) -> Call:
    """Read the body of ``/v1/completions``: ``prompt`` is one string or one array of token ids."""
    prompt: Any = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    ids: tuple[int, ...] | None = None
    if isinstance(prompt, list):
        if not prompt:
            refuse("prompt", "must not be empty")
        for item in prompt:
            if isinstance(item, str | list):
                refuse("prompt", "several prompts in one request are not supported; send one request each")
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                refuse("prompt", f"must hold token ids between 0 and {vocab_size - 1}")
        ids = tuple(prompt)
    else:
        prompt = text(prompt, "prompt")
        if not prompt:
            refuse("prompt", "must not be empty")
    return Call(
        options=body,
        prompt=None if ids is not None else prompt,
        prompt_ids=ids,
        compression=check_compression(body.get("compression")),
        cache_salt=check_cache_salt(body.get("cache_salt"), config),
        tenant=tenant,
    )
