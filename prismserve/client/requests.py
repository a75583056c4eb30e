"""From arguments to a ``GenerateRequest``. Pure but for reading image files; shared by both clients."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypedDict, TypeVar

from prismserve.client.content import Video, messages_of
from prismserve.client.errors import RequestError
from prismserve.protocol import prismserve_pb2 as pb

if TYPE_CHECKING:
    from prismserve.client.content import Conversation, ImageSource, VideoSource

MessageT = TypeVar("MessageT")


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``stream``; what is not given is decided by the server.

    Attributes:
        prompt: raw completion instead of a conversation.
        images: put before the text of the last user message.
        videos: put there too, behind the images.
        model: the served model's name.
        compression: preset or method name, or the plan as a mapping; ``"off"`` is exact.
        cache_salt: caches are shared only between requests with equal salts.
        request_id: letters, digits, ``-``, ``_``, ``.``, at most 128.
        timeout_s: for the whole call, retries included, in seconds.
        max_tokens: tokens generated at most.
        min_tokens: tokens generated at least, before a stop counts.
        temperature: 0 is greedy.
        top_p: nucleus, in (0, 1].
        top_k: 0 is off.
        min_p: least share of the most likely token's probability, in [0, 1].
        repetition_penalty: 1 is off.
        presence_penalty: 0 is off.
        frequency_penalty: 0 is off.
        seed: of the random stream.
        stop: strings that end the answer and are not part of it.
        stop_token_ids: token ids that end the answer.
        ignore_eos: go on to ``max_tokens`` past the end token.
        logit_bias: added to the logits of tokens, by token id, in [-100, 100].
        logprobs: report the log-probability of every token, and of so many alternatives to each (0 to 20).
        n: answers; see :attr:`Answer.choices`.
        json_schema: the answer is JSON that fits this schema, given as a mapping or as JSON text.
        json_object: the answer is a JSON object.
        regex: the answer matches this regular expression as a whole.
        grammar: the answer follows this grammar (Lark, GBNF or EBNF).
        choice: the answer is one of these strings.
    """

    prompt: str
    images: Sequence[ImageSource]
    videos: Sequence[VideoSource | Video]
    model: str
    compression: str | Mapping[str, Any]
    cache_salt: str
    request_id: str
    timeout_s: float
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logit_bias: Mapping[int, float]
    logprobs: int
    n: int
    json_schema: str | Mapping[str, Any]
    json_object: bool
    regex: str
    grammar: str
    choice: Sequence[str]


SAMPLING_FIELDS: Final = frozenset(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)
_REPEATED: Final = frozenset({"stop", "stop_token_ids", "choice"})
_CONSTRAINTS: Final = ("json_schema", "json_object", "regex", "grammar", "choice")


def build_request(conversation: Conversation | None, options: GenerateOptions) -> pb.GenerateRequest:
    """Build the request of one call.

    Args:
        conversation: a question or the turns; None for a raw ``prompt``.
        options: keyword arguments; unknown ones are refused.

    Raises:
        RequestError: names the argument that is malformed.
    """
    unknown = set(options) - set(GenerateOptions.__annotations__)
    if unknown:
        message = f"{min(unknown)}: no such argument; there are {', '.join(sorted(GenerateOptions.__annotations__))}"
        raise RequestError(message, field=min(unknown))
    prompt = options.get("prompt")
    if (conversation is None) == (prompt is None):
        message = "messages: give either messages or prompt"
        raise RequestError(message, field="messages")
    images = options.get("images", ())
    if prompt is not None and images:
        message = "images: a raw prompt takes none; give messages"
        raise RequestError(message, field="images")
    if isinstance(images, (str, bytes)):
        message = "images: must be a list of images, not one"
        raise RequestError(message, field="images")
    videos = options.get("videos", ())
    if prompt is not None and videos:
        message = "videos: a raw prompt takes none; give messages"
        raise RequestError(message, field="videos")
    if isinstance(videos, (str, bytes, Video)):
        message = "videos: must be a list of videos, not one"
        raise RequestError(message, field="videos")
    messages = messages_of(conversation, images, videos) if conversation is not None else []
    texts = {name: options.get(name, "") for name in ("model", "cache_salt", "request_id")}
    return _checked(
        "request",
        pb.GenerateRequest,
        messages=messages,
        prompt=prompt or "",
        sampling=sampling_of(options),
        compression=compression_text(options.get("compression")),
        **texts,
    )


def sampling_of(options: GenerateOptions) -> pb.SamplingParams:
    """The sampling parameters among the options; RequestError names one the wire cannot hold."""
    sampling = pb.SamplingParams()
    given: Mapping[str, Any] = options
    constraints = [name for name in _CONSTRAINTS if given.get(name)]
    if len(constraints) > 1:
        message = f"{constraints[1]}: an answer can have one constraint only, and {constraints[0]} gives one already"
        raise RequestError(message, field=constraints[1])
    for name in sorted(SAMPLING_FIELDS & set(given)):
        value = given[name]
        if value is None:
            continue
        if name in _REPEATED:
            value = [value] if isinstance(value, str) else list(value)
        elif name == "json_schema":
            value = value if isinstance(value, str) else _json_text(name, value)
        sampling.MergeFrom(_checked(name, pb.SamplingParams, **{name: value}))
    return sampling


def compression_text(compression: str | Mapping[str, Any] | None) -> str:
    """The wire form of the ``compression`` argument: a name as it is, a plan as canonical JSON, None as empty."""
    if compression is None:
        return ""
    if isinstance(compression, str):
        return compression
    return _json_text("compression", compression, sort_keys=True)


def _json_text(field: str, value: Any, *, sort_keys: bool = False) -> str:
    try:
        return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        message = f"{field}: cannot be written as JSON: {error}"
        raise RequestError(message, field=field) from None


def choices_of(options: GenerateOptions) -> int:
    """How many answers a call asks for."""
    return options.get("n") or 1


def timeout_of(options: GenerateOptions, default_s: float) -> float:
    """The call's time limit in seconds; RequestError unless it is finite and positive."""
    return checked_timeout(options.get("timeout_s", default_s))


def checked_timeout(timeout_s: float) -> float:
    """``timeout_s`` itself; RequestError unless it is finite and positive."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        message = f"timeout_s: must be a number of seconds, not {type(timeout_s).__name__}"
        raise RequestError(message, field="timeout_s")
    if not math.isfinite(timeout_s) or timeout_s <= 0:
        message = f"timeout_s: must be finite and positive, got {timeout_s}"
        raise RequestError(message, field="timeout_s")
    return float(timeout_s)


def _checked(field: str, kind: type[MessageT], **values: Any) -> MessageT:
    """Construct a protobuf message, translating its type and range errors."""
    try:
        return kind(**values)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:  # the last for a list in place of a map
        message = f"{field}: {error}"
        raise RequestError(message, field=field) from None
