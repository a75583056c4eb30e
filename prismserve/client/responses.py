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
        visual_tokens_after: visual tokens that were kept.
        kv_bytes_before: KV of the prompt without any compression, in bytes.
        kv_bytes_after: KV of the prompt as it was kept, in bytes.
        kv_bytes_sent: bytes that crossed from prefill to decode.
        transport: what carried them; ``local`` when nothing had to move.
        ttft_ms: from the request's arrival to its first token.
        prefill_worker: id of the worker that prefilled.
        decode_worker: id of the worker that decoded.
        images: images in the prompt.
        images_cached: of these, how many were not encoded again.
        queue_ms: waited before prefill began.
        encode_ms: vision encoder and compression.
        prefill_ms: prompt through the decoder.
        transfer_ms: moving KV, overlapped with prefill or not.
        transfer_exposed_ms: the part of it that delayed the first token.
        route_reason: why the router chose these workers.
        compression: the plan as applied, canonical JSON.
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
    queue_ms: float = 0.0
    encode_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0
    transfer_exposed_ms: float = 0.0
    route_reason: str = ""
    compression: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """What arrived in one message of a stream.

    Attributes:
        text: new text.
        token_ids: new token ids.
        finish_reason: ``stop`` or ``length`` in the last message, None before it.
        usage: in the last message, None before it.
        request_id: the server's name of the request.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    usage: Usage | None
    request_id: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer; the fields are those of all its :class:`Delta` together."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    request_id: str


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
    """Fold the messages of one answer."""

    request_id: str = ""
    _text: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _last: Delta | None = None

    def add(self, response: pb.GenerateResponse) -> Delta:
        """Take one message in; what it brought."""
        self.request_id = response.request_id or self.request_id
        delta = Delta(
            text=response.text,
            token_ids=tuple(response.token_ids),
            finish_reason=response.finish_reason or None,
            usage=usage_of(response.usage) if response.HasField("usage") or response.finish_reason else None,
            request_id=self.request_id,
        )
        self._text.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        if delta.finish_reason is not None:
            self._last = delta
        return delta

    def close(self) -> Answer:
        """The complete answer. IncompleteAnswerError when no message carried a finish reason."""
        if self._last is None or self._last.finish_reason is None:
            message = f"the answer ended after {len(self._token_ids)} tokens without a finish reason"
            raise IncompleteAnswerError(message, request_id=self.request_id or None)
        return Answer(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=self._last.finish_reason,
            usage=self._last.usage or Usage(),
            request_id=self.request_id,
        )


def usage_of(message: pb.Usage) -> Usage:
    """Copy a usage message."""
    return Usage(**{name.name: getattr(message, name.name) for name in dataclasses.fields(Usage)})


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
