"""Tokenization in which a user cannot type a control token.

A chat template mixes control tokens (``<|user|>``, ``<image>``) with text that users wrote, as one string. Here the
tokenizer is a copy of the checkpoint's whose control tokens have unguessable spellings; only those the template wrote
are given that spelling, so the same characters typed by a user are plain text. Everything else of the tokenizer is
untouched, so ids equal those of the checkpoint's own tokenizer wherever users type no control token.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

# Private-use characters survive every normaliser and are not white space to templates that trim.
_OPEN, _CLOSE = "\ue000", "\ue001"


def _spelling(nonce: str, kind: str, number: int) -> str:
    return f"{_OPEN}{nonce}{kind}{number:x}{_CLOSE}"


def _respell(definition: dict[str, Any], spellings: dict[str, str]) -> None:
    """Rename control tokens wherever a tokenizer.json gives them by content."""
    for token in definition["added_tokens"]:
        token["content"] = spellings.get(token["content"], token["content"])
    model = definition["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {spellings.get(piece, piece): number for piece, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[spellings.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = spellings.get(model["unk_token"], model["unk_token"])


class GuardedTokenizer:
    """Encodes rendered templates and plain text; thread-safe.

    Args:
        tokenizer: the checkpoint's fast tokenizer; not changed.
        placeholders: what users cannot type beside the tokens marked as special, such as an image placeholder; one
            that is no token is hidden by :meth:`guard` and otherwise left alone.
    """

    def __init__(self, tokenizer: TokenizersBackend, placeholders: frozenset[str] = frozenset()) -> None:
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        special = {token["content"] for token in definition["added_tokens"] if token["special"]}
        controls = sorted(special | placeholders)
        tokens = special | tokenizer.get_added_vocab().keys()
        nonce = secrets.token_hex(16)
        self._boundary = f"{_OPEN}{nonce}{_CLOSE}"
        self._written = {
            control: _spelling(nonce, "w", number) for number, control in enumerate(controls) if control in tokens
        }
        self._typed = {control: _spelling(nonce, "t", number) for number, control in enumerate(controls)}
        self._restore = {typed: control for control, typed in self._typed.items()} | {self._boundary: ""}
        # Longest first, so that a control token that begins with another is matched whole.
        ordered = sorted(controls, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._guards = re.compile("|".join(map(re.escape, self._restore)))
        _respell(definition, self._written)
        self._tokenizer = Tokenizer.from_str(json.dumps(definition))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def guard(self, text: str) -> str:
        """Mark text a user wrote, before it enters a template.

        Control tokens in it are hidden from :meth:`encode_rendered`. Its ends are marked inside surrounding white
        space (templates may trim), so that none can be pieced together from several texts either.
        """
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        hidden = self._controls.sub(lambda match: self._typed[match.group()], core)
        return f"{text[:start]}{self._boundary}{hidden}{self._boundary}{text[start + len(core) :]}"

    def encode_rendered(self, rendered: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a rendered template whose user texts went through :meth:`guard`."""
        written = self._controls.sub(lambda match: self._written.get(match.group(), match.group()), rendered)
        text = self._guards.sub(lambda match: self._restore[match.group()], written)
        return self.encode_plain(text, add_special_tokens=add_special_tokens)

    def encode_plain(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of text in which nothing is a control token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids
