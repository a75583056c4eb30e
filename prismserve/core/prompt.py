"""The elements of a prompt and the chained keys of its full blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from prismserve.core.hashing import digest, pack_ids
from prismserve.core.types import BlockKey, MediaSegment, Prompt, TextSegment

Element: TypeAlias = int | tuple[bytes, int]
"""What fills one cache slot: a token id, or (embedding key, offset in the image's kept tokens)."""


def elements(prompt: Prompt, extra_token_ids: Iterable[int] = ()) -> list[Element]:
    """List what fills each cache slot of a prompt, then of tokens generated after it."""
    out: list[Element] = []
    for segment in prompt.segments:
        if isinstance(segment, TextSegment):
            out.extend(segment.token_ids)
        elif isinstance(segment, MediaSegment):
            out.extend((segment.key, offset) for offset in range(segment.tokens))
    out.extend(extra_token_ids)
    return out


def block_key(parent: bytes, block: Sequence[Element]) -> BlockKey:
    """Key of one full block: its parent's key, its token ids, and the media that fill its slots."""
    ids: list[int] = []
    runs: list[bytes] = []
    previous: tuple[bytes, int] | None = None
    for slot, element in enumerate(block):
        if isinstance(element, int):
            ids.append(element)
            previous = None
            continue
        key, offset = element
        ids.append(-1)
        if previous is None or previous[0] != key or previous[1] + 1 != offset:
            runs.append(pack_ids((slot, offset)) + key)
        previous = element
    return digest("block", parent, pack_ids(ids), b"".join(runs))


def block_keys(namespace: bytes, slots: Sequence[Element], block_tokens: int) -> list[BlockKey]:
    """Chained keys of the full blocks in ``slots``; a trailing partial block has none."""
    keys: list[BlockKey] = []
    parent = namespace
    for start in range(0, len(slots) - block_tokens + 1, block_tokens):
        parent = block_key(parent, slots[start : start + block_tokens])
        keys.append(parent)
    return keys


def scored_plan(plan: bytes, model_fingerprint: bytes, scoring_token_ids: Sequence[int]) -> bytes:
    """What stands for ``plan`` in the key of embeddings chosen by a question: the model that read it, and its ids."""
    return digest("scored-plan", plan, model_fingerprint, pack_ids(scoring_token_ids))


def image_key(pixel_hash: bytes, processor_fingerprint: bytes, encoder_fingerprint: bytes, plan: bytes) -> bytes:
    """Key of the embeddings an image turns into: pixels, processor, encoder, visual plan fingerprint.

    Where a method asks about the question, ``plan`` is what :func:`scored_plan` made of the fingerprint.
    """
    return digest("image", pixel_hash, processor_fingerprint, encoder_fingerprint, plan)
