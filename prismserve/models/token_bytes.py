"""The bytes each token stands for, for reports about single tokens."""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE: Final = "\u2581"


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte in byte-level vocabularies: printable bytes are themselves, others follow from U+0100 (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(hidden)}


class TokenBytes:
    """Bytes by token id; a character may be spread over several tokens.

    Args:
        tokenizer: byte-level BPE, or SentencePiece style with or without byte pieces.
    """

    def __init__(self, tokenizer: TokenizersBackend) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
        decoder = tokenizer.backend_tokenizer.decoder
        state = json.loads(decoder.__getstate__()) if decoder is not None else {}
        kinds = {state.get("type"), *(part.get("type") for part in state.get("decoders", ()))}
        self._byte_level = "ByteLevel" in kinds

    def of(self, token_id: int) -> bytes:
        """The bytes of a token; none for an id the tokenizer does not have."""
        added: str | None = self._added.get(token_id)
        if added is not None:
            return added.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return b""
        if self._byte_level:
            alphabet = _byte_level_alphabet()
            return bytes(alphabet[character] for character in piece if character in alphabet)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()
