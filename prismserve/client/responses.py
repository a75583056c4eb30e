"""From messages of the wire to what callers get. Pure; shared by both clients."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prismserve.client.errors import IncompleteAnswerError, InternalServerError
from prismserve.core.types import WorkerStats

if TYPE_CHECKING:
    from prismserve.protocol import prismserve_pb2 as pb


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer cost.

    Attributes:
        prompt_tokens: cache slots of the prompt, after compression.
        completion_tokens: tokens generated.
        cached_tokens: prompt tokens that were not computed again.
        visual_tokens_before: visual tokens the encoder made.
        visual_tokens_after: visual tokens that were kept, down to the last layer.
        kv_bytes_before: KV of the prompt without any compression, in bytes.
        kv_bytes_after: KV of the prompt as it was kept, in bytes.
        kv_bytes_sent: bytes that crossed from prefill to decode.
        transport: what carried them; ``local`` when nothing had to move.
        ttft_ms: from the request's arrival to its first token.
        prefill_worker: id of the worker that prefilled.
        decode_worker: id of the worker that decoded.
        images: images in the prompt.
        images_cached: images and videos that were not encoded again.
        videos: videos in the prompt.
        frames: frames of all videos, as the model saw them.
        queue_ms: waited before prefill began.
        encode_ms: vision encoder and compression.
        prefill_ms: prompt through the decoder.
        transfer_ms: moving KV, overlapped with prefill or not.
        transfer_exposed_ms: the part of it that delayed the first token.
        route_reason: why the router chose these workers.
        compression: the plan as applied, canonical JSON.
        visual_tokens_by_cut: visual tokens that a prefill method left behind each of its cuts; empty without one.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    visual_tokens_before: int = 0
    visual_tokens_after: int = 0
    kv_bytes_before: int = 0
    kv_bytes_after: int = 0
    kv_bytes_sent: int = 0
    transport: str = ""
    ttft_ms: float = 0.0
    prefill_worker: str = ""
    decode_worker: str = ""
    images: int = 0
    images_cached: int = 0
    videos: int = 0
    frames: int = 0
    queue_ms: float = 0.0
    encode_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0
    transfer_exposed_ms: float = 0.0
    route_reason: str = ""
    compression: str = ""
    visual_tokens_by_cut: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was to the model, before everything that steers sampling.

    Attributes:
        token_id: of the token.
        token: its bytes; one character may be spread over several tokens.
        logprob: natural logarithm of its probability.
        top: the most likely tokens in its place, best first; empty for those themselves.
    """

    token_id: int
    token: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What arrived in one message of a stream.

    Attributes:
        text: new text.
        token_ids: new token ids.
        finish_reason: ``stop`` or ``length`` in the last message of an answer, None before it.
        usage: in the last message of the call, None before it.
        request_id: the server's name of the request.
        index: which of the ``n`` answers this belongs to.
        logprobs: of the new tokens, if they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    usage: Usage | None
    request_id: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the ``n`` answers to a call."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer; the fields are those of all its :class:`Delta` together.

    Attributes:
        usage: of all choices together.
        choices: all ``n`` answers; ``text`` and the like are those of the first.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    request_id: str
    logprobs: tuple[TokenLogprob, ...] = ()
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served.

    Attributes:
        id: the name to ask for.
        max_model_len: prompt and answer together, in tokens.
    """

    id: str
    max_model_len: int


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker as the cluster sees it, with the counters it last reported."""

    id: str
    role: str
    pid: int
    node: str
    state: str
    epoch: int
    stats: WorkerStats


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """State of the cluster.

    Attributes:
        workers: every registered worker.
        document: the whole document, as ``prismserve status --json`` prints it.
    """

    workers: tuple[WorkerStatus, ...]
    document: Mapping[str, Any]


@dataclass(slots=True)
class AnswerFold:
    """Fold the messages of one call.

    Args:
        choices: answers that were asked for.
    """

    choices: int = 1
    request_id: str = ""
    _deltas: dict[int, list[Delta]] = field(default_factory=dict)
    _usage: Usage | None = None

    def add(self, response: pb.GenerateResponse) -> Delta:
        """Take one message in; what it brought."""
        self.request_id = response.request_id or self.request_id
        delta = Delta(
            text=response.text,
            token_ids=tuple(response.token_ids),
            finish_reason=response.finish_reason or None,
            usage=usage_of(response.usage) if response.HasField("usage") else None,
            request_id=self.request_id,
            index=response.index,
            logprobs=tuple(_logprob_of(item) for item in response.logprobs),
        )
        self._deltas.setdefault(delta.index, []).append(delta)
        self._usage = delta.usage or self._usage
        return delta

    def close(self) -> Answer:
        """The complete answer. IncompleteAnswerError when one of the choices got no finish reason."""
        choices = tuple(self._choice(self._deltas.get(index, [])) for index in range(self.choices))
        first = choices[0]
        return Answer(
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            usage=self._usage or Usage(),
            request_id=self.request_id,
            logprobs=first.logprobs,
            choices=choices,
        )

    def _choice(self, deltas: list[Delta]) -> Choice:
        token_ids = tuple(token for delta in deltas for token in delta.token_ids)
        reason = deltas[-1].finish_reason if deltas else None
        if reason is None:
            message = f"the answer ended after {len(token_ids)} tokens without a finish reason"
            raise IncompleteAnswerError(message, request_id=self.request_id or None)
        logprobs = tuple(item for delta in deltas for item in delta.logprobs)
        return Choice("".join(delta.text for delta in deltas), token_ids, reason, logprobs)


def _logprob_of(message: pb.TokenLogprobs) -> TokenLogprob:
    chosen = message.chosen
    top = tuple(TokenLogprob(item.token_id, item.token, item.logprob) for item in message.top)
    return TokenLogprob(chosen.token_id, chosen.token, chosen.logprob, top)


def usage_of(message: pb.Usage) -> Usage:
    """Copy a usage message."""
    values = {field.name: getattr(message, field.name) for field in dataclasses.fields(Usage)}
    values["visual_tokens_by_cut"] = tuple(message.visual_tokens_by_cut)
    return Usage(**values)


def models_of(message: pb.ListModelsResponse) -> tuple[Model, ...]:
    """Copy the model list."""
    return tuple(Model(card.id, card.max_model_len) for card in message.models)


def status_of(message: pb.GetStatusResponse) -> ClusterStatus:
    """Read the status document; InternalServerError when it is not the document this SDK knows."""
    try:
        document = json.loads(message.json)
        workers = tuple(_worker(entry) for entry in document["workers"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        text = f"the status document cannot be read ({type(error).__name__}: {error})"
        raise InternalServerError(text) from None
    return ClusterStatus(workers, document)


def presets_of(message: pb.SetPresetResponse) -> Mapping[str, Any]:
    """Read the state of the presets; InternalServerError when it is no document with a block ``presets``."""
    try:
        document = json.loads(message.json)
        known = isinstance(document["presets"], dict)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        text = f"the state of the presets cannot be read ({type(error).__name__}: {error})"
        raise InternalServerError(text) from None
    if not known:
        text = "the state of the presets is not a mapping"
        raise InternalServerError(text)
    found: Mapping[str, Any] = document
    return found


def _worker(entry: Mapping[str, Any]) -> WorkerStatus:
    counters = entry.get("stats") or {}
    # A newer server may report counters this SDK does not know: they stay in the document.
    known = {item.name: counters[item.name] for item in dataclasses.fields(WorkerStats) if item.name in counters}
    return WorkerStatus(
        id=str(entry["id"]),
        role=str(entry["role"]),
        pid=int(entry["pid"]),
        node=str(entry["node"]),
        state=str(entry["state"]),
        epoch=int(entry["epoch"]),
        stats=WorkerStats(**known),
    )
