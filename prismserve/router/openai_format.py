"""OpenAI's response objects, for chat and for raw completions, streamed and whole."""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from prismserve.core.types import FinishReason
    from prismserve.router.requests import ModelFacts
    from prismserve.router.usage import Usage

SSE_DONE: Final = b"data: [DONE]\n\n"


def sse(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Format:
    """Builds the objects of one answer: same id, time, model and fingerprint in each.

    Args:
        facts: of the served model.
        chat: chat completion, else raw completion.
        include_usage: streaming only: a last chunk with usage, and ``usage: null`` in the others.
    """

    def __init__(self, facts: ModelFacts, *, chat: bool, include_usage: bool) -> None:
        self._chat = chat
        self._include_usage = include_usage
        self._base: dict[str, Any] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "object": "",
            "created": int(time.time()),
            "model": facts.name,
            "system_fingerprint": f"fp_{facts.fingerprint.hex()[:12]}",
        }

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason.value}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._base, "object": kind, "choices": [choice], "usage": usage.openai()}

    def opening(self) -> dict[str, Any] | None:
        """The first chunk of a chat stream, which names the role; None for raw completions."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self._chat else None

    def delta(self, text: str) -> dict[str, Any]:
        """A chunk with new text."""
        return self._chunk({"content": text} if self._chat else text, None)

    def ending(self, reason: FinishReason) -> dict[str, Any]:
        """The chunk that says why generation ended."""
        return self._chunk({} if self._chat else "", reason.value)

    def usage(self, usage: Usage) -> dict[str, Any] | None:
        """The usage chunk, if it was asked for."""
        if not self._include_usage:
            return None
        return {**self._stream_base(), "choices": [], "usage": usage.openai()}

    def _stream_base(self) -> dict[str, Any]:
        return {**self._base, "object": "chat.completion.chunk" if self._chat else "text_completion"}

    def _chunk(self, content: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta" if self._chat else "text": content, "logprobs": None, "finish_reason": reason}
        chunk = {**self._stream_base(), "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return chunk
