"""LangDC, which exists only as trained: named here so that asking for it says what it needs.

Source: Wang et al., "Seeing More, Saying More: Lightweight Language Experts are Dynamic Video Token Compressors", EMNLP
2025 (arXiv:2509.00969), and its published code.
"""

from __future__ import annotations

from typing import ClassVar, NoReturn

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from prismserve.compression.base import Need, Share, Stage, VisualFeatures
from prismserve.core.config import FrozenConfig
from prismserve.core.errors import EngineError

_REASON = (
    "langdc needs its own trained weights (a captioner, and the projectors around it), which no served model family has; "
    "dynamicvlm and longvu give videos a budget without training"
)


class LangDCConfig(FrozenConfig):
    """Always refused: there is nothing to run."""

    @model_validator(mode="after")
    def _untrained(self) -> LangDCConfig:
        kind = "needs_weights"
        raise PydanticCustomError(kind, _REASON)


class LangDC:
    """A small language model captions each clip; its hidden states take the place of the clip's visual tokens.

    Richer clips get longer captions, and so more tokens. All of it was trained: the captioner, what it reads and what reads
    it. There is no part that works without those weights, so every request for it is refused, and nothing takes its place.
    """

    name: ClassVar[str] = "langdc"
    version: ClassVar[int] = 1
    stage: ClassVar[Stage] = Stage.VISUAL
    section: ClassVar[str] = "IV-A.2b"
    source: ClassVar[str] = "Wang et al., LangDC, EMNLP 2025, arXiv:2509.00969"
    training_free: ClassVar[bool] = False
    share: ClassVar[Share] = Share.AGNOSTIC
    nested: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()
    Config: ClassVar[type[LangDCConfig]] = LangDCConfig

    def kept_tokens(self, config: LangDCConfig, tokens: int) -> NoReturn:  # noqa: ARG002 - nothing runs
        """EngineError, always."""
        raise EngineError(_REASON)

    def plan(self, features: VisualFeatures, config: LangDCConfig) -> NoReturn:  # noqa: ARG002 - nothing runs
        """EngineError, always."""
        raise EngineError(_REASON)


METHOD = LangDC()
