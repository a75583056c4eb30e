"""Text from a growing list of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes, so after this many tokens a replacement character is what the model meant.
_MAX_PENDING_TOKENS = 8


class TextDecoder(Protocol):
    """Token ids to text without clean-up; ``Processor`` is one."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        ...


class IncrementalDetokenizer:
    """Turns token ids into text piece by piece; the pieces joined equal decoding all ids at once.

    A window of recent ids is decoded again with each push, because decoders look at the ids before (white space at
    the start, bytes of one character spread over tokens). Cost per push does not grow with the length of the text.

    Args:
        decoder: usually the ``Processor``.
    """

    def __init__(self, decoder: TextDecoder) -> None:
        self._decode = decoder.decode
        self._ids: list[int] = []
        self._read = 0
        self._known = ""

    def push(self, token_ids: Iterable[int]) -> str:
        """Add ids; returns the text that is now certain, never part of a UTF-8 character."""
        out: list[str] = []
        for token_id in token_ids:
            self._ids.append(token_id)
            text = self._decode(self._ids)
            patience_over = len(self._ids) - self._read >= _MAX_PENDING_TOKENS
            if text.endswith(_REPLACEMENT) and not patience_over:
                continue
            out.append(self._advance(text))
        return "".join(out)

    def flush(self) -> str:
        """The text still held back, at the end of generation."""
        return self._advance(self._decode(self._ids)) if len(self._ids) > self._read else ""

    def _advance(self, text: str) -> str:
        """Emit what ``text`` adds and slide the window: what was new becomes the context of what comes."""
        piece = text[len(self._known) :]
        if piece:
            # Ids that show no text (special tokens) stay in the window until some do, as decoders may look back.
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
            self._known = self._decode(self._ids)
        elif len(self._ids) > 2 * _MAX_PENDING_TOKENS:
            self._ids = self._ids[-_MAX_PENDING_TOKENS:]
            self._read = len(self._ids)
            self._known = self._decode(self._ids)
        return piece
