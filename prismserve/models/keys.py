"""Names of a checkpoint's tensors in the layouts the hub has, and the names they have here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

Rules: TypeAlias = tuple[tuple[re.Pattern[str], str], ...]
"""Patterns with what replaces them."""


def rules(*pairs: tuple[str, str]) -> Rules:
    """Compile patterns."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def renamed(key: str, candidates: Iterable[tuple[re.Pattern[str], str]]) -> str:
    """``key`` with the first pattern that is found in it replaced; ``key`` itself if none is."""
    for pattern, replacement in candidates:
        result, hits = pattern.subn(replacement, key, count=1)
        if hits:
            return result
    return key


TEXT: Final = rules(
    (r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.", "decoder.lm_head."),
    (r"^lm_head\.", "decoder.lm_head."),
    (r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?", "decoder."),
)
"""Decoder keys: ``language_model.model.*`` and ``language_model.lm_head.*`` (hub, before transformers 4.52), and
``model.language_model.*`` and ``lm_head.*`` (since)."""

TOWER: Final = rules(
    # CLIP and SigLIP towers lost an inner module in transformers 5.
    (r"^(?:model\.)?vision_tower\.vision_model\.", "vision.vision_tower."),
    (r"^(?:model\.)?(?=vision_tower\.|multi_modal_projector\.|image_newline$)", "vision."),
)
"""Keys of the LLaVA line's towers and projectors, in both layouts."""
