"""OpenAI's response objects, for chat and for raw completions, streamed and whole."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.core.types import FinishReason, TokenLogprobs
    from prismserve.models.token_bytes import TokenBytes
    from prismserve.router.generation import TextDelta
    from prismserve.router.requests import ModelFacts
    from prismserve.router.usage import Usage

SSE_DONE: Final = b"data: [DONE]\n\n"


def sse(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass(slots=True)
class Choice:
    """One answer as it is gathered."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: FinishReason | None = None

    def add(self, delta: TextDelta) -> None:
        """Take in what is new."""
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)


class Format:
    """Builds the objects of one answer: same id, time, model and fingerprint in each.

    Args:
        facts: of the served model.
        token_bytes: what the tokens in ``logprobs`` are shown as.
        chat: chat completion, else raw completion.
        include_usage: streaming only: a last chunk with usage, and ``usage: null`` in the others.
    """

    def __init__(self, facts: ModelFacts, token_bytes: TokenBytes, *, chat: bool, include_usage: bool) -> None:
        self._token_bytes = token_bytes
        self._chat = chat
        self._include_usage = include_usage
        self._offsets: dict[int, int] = {}
        self._base: dict[str, Any] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "object": "",
            "created": int(time.time()),
            "model": facts.name,
            "system_fingerprint": f"fp_{facts.fingerprint.hex()[:12]}",
        }

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        kind = "chat.completion" if self._chat else "text_completion"
        items = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._base, "object": kind, "choices": items, "usage": usage.openai()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a chat choice, which names the role; None for raw completions."""
        return self._chunk(index, {"role": "assistant", "content": ""}) if self._chat else None

    def delta(self, delta: TextDelta) -> dict[str, Any]:
        """A chunk with new text."""
        content: Any = {"content": delta.text} if self._chat else delta.text
        return self._chunk(delta.index, content, self._logprobs(delta.index, delta.token_ids, delta.logprobs))

    def ending(self, index: int, reason: FinishReason) -> dict[str, Any]:
        """The chunk that says why generation of a choice ended."""
        return self._chunk(index, {} if self._chat else "", reason=reason.value)

    def usage(self, usage: Usage) -> dict[str, Any] | None:
        """The usage chunk, if it was asked for."""
        if not self._include_usage:
            return None
        return {**self._stream_base(), "choices": [], "usage": usage.openai()}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        return {
            "index": index,
            **({"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}),
            "logprobs": self._logprobs(index, choice.token_ids, choice.logprobs),
            "finish_reason": choice.reason.value if choice.reason is not None else None,
        }

    def _stream_base(self) -> dict[str, Any]:
        return {**self._base, "object": "chat.completion.chunk" if self._chat else "text_completion"}

    def _chunk(
        self, index: int, content: Any, logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        part = "delta" if self._chat else "text"
        choice = {"index": index, part: content, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._stream_base(), "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    # ---- log-probabilities -----------------------------------------------------------------------------------

    def _logprobs(
        self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, Any] | None:
        if not logprobs:
            return None
        pairs = list(zip(token_ids, logprobs, strict=True))
        if self._chat:
            content = [
                {**self._entry(token, item.logprob), "top_logprobs": [self._entry(*other) for other in item.top]}
                for token, item in pairs
            ]
            return {"content": content, "refusal": None}
        return self._completion_logprobs(index, pairs)

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._token_bytes.of(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    def _completion_logprobs(self, index: int, pairs: Sequence[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        offset = self._offsets.get(index, 0)
        tokens: list[str] = []
        offsets: list[int] = []
        tops: list[dict[str, float]] = []
        for token_id, item in pairs:
            tokens.append(self._text(token_id))
            offsets.append(offset)
            offset += len(tokens[-1])
            top: dict[str, float] = {}
            for other, logprob in (*item.top, (token_id, item.logprob)):
                top.setdefault(self._text(other), logprob)  # tokens that show alike: the most likely one
            tops.append(top)
        self._offsets[index] = offset
        values = [item.logprob for _, item in pairs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _text(self, token_id: int) -> str:
        return self._token_bytes.of(token_id).decode(errors="replace")
