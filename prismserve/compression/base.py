"""What a compression method declares, and the tensors it sees."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from prismserve.core.config import FrozenConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from prismserve.core.types import KVLayout


KEEP_MAX: Final = 1 << 20
"""No image has more tokens; a larger count is a mistake."""


class Stage(enum.StrEnum):
    """Where a method acts."""

    VISUAL = "visual"
    PREFILL = "prefill"
    KV = "kv"
    DECODE = "decode"
    CODEC = "codec"


class Share(enum.StrEnum):
    """May the result be reused by another request."""

    AGNOSTIC = "AGN"
    AGNOSTIC_IN_MODEL = "AGN*"
    QUERY = "QRY"
    READ_ONLY = "RO"
    PRIVATE = "PRIV"


Reduction: TypeAlias = Literal["mean", "max"]

Asked: TypeAlias = Callable[[float, Reduction], "torch.Tensor"]
"""See ``VisualFeatures.asked``."""

Coded: TypeAlias = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""See ``VisualFeatures.coded``."""

Guided: TypeAlias = Callable[["torch.Tensor", "torch.Tensor"], "tuple[torch.Tensor, torch.Tensor]"]
"""See ``VisualFeatures.guided``."""


class Need(enum.StrEnum):
    """What the engine must provide beside the tokens themselves."""

    CLS_ATTENTION = "cls_attention"
    ENCODER_KEYS = "encoder_keys"
    TEXT_TOWER = "text_tower"
    PROJECTED = "projected"
    TEXT_EMBEDDINGS = "text_embeddings"
    QUESTION_ATTENTION = "question_attention"
    SELECTOR = "token_selector"
    UNPOOLED = "unpooled_frames"
    CODE_ATTENTION = "vqtoken"
    CLASS_TOKEN = "class_token"  # noqa: S105 - of an image
    CONTEXT = "llamavid"


BESIDE_THE_MODEL: Final = frozenset({Need.TEXT_TOWER, Need.SELECTOR, Need.CODE_ATTENTION, Need.CONTEXT})
"""What has weights of its own, in a folder of that name in the model's directory."""

FROM_ANY_MODEL: Final = frozenset({Need.PROJECTED, Need.TEXT_EMBEDDINGS, Need.QUESTION_ATTENTION})
"""What every model that sees can provide; the rest depends on its encoder."""


@dataclass(frozen=True, slots=True)
class VisualFeatures:
    """One image or video after the vision encoder, before the projector.

    Attributes:
        tokens: [N, C] patch features of the layer the projector reads; of a video, frame after frame.
        grid: (rows, columns) of one frame, raster order; frames x rows x columns = N.
        cls_attention: [H, N] float32, softmax attention of the class token to the patches in the encoder layer that
            made ``tokens``; None unless asked for by ``needs``. Rows sum to 1 minus the class token's own share.
        keys: [N, H, d] keys of that layer; None unless asked for.
        seed: 8 bytes from the pixel hash, the only randomness a method may use.
        frames: of a video, how many frames ``tokens`` holds (where an encoder merges neighbouring frames, after that);
            1 for an image. What stands around the frames (time stamps, a closing token) is not among ``tokens``, is
            always kept, and does not count towards the budget.
        projected: [N, D] the decoder's inputs if every token were kept; None unless asked for.
        text: [M, D] the decoder's embeddings of the scoring text (see ``Request.scoring_token_ids``), M may be 0; None
            unless asked for.
        asked: attention that the scoring text pays to each token inside the decoder, [N] float32, computed when called with
            the depth of the layer, as a share of all layers, and how heads and rows of the text are taken together;
            zeros if there is no text. A pass of the decoder up to that layer. None unless asked for.
        aligned: [N, P] patches in the space the encoder shares with its text tower; None unless asked for.
        aligned_text: [S, P] segments of the scoring text in that space; None unless asked for.
        selected: as ``asked``, but of the last layer of the trained selector beside the model, whatever depth is named; None
            unless asked for.
        unpooled: of a video, [T, P, D] decoder embeddings of the patches of each frame, before the model pools them to
            ``grid``; None unless asked for.
        coded: the trained attention over codes beside the model: takes a map of codes [T, P] int64 and the codes [K, D]
            float32, T at most K, and gives K decoder inputs, [K, D] float32. None unless asked for.
        class_token: [T, C], what the encoder gives of each frame beside its patches; None unless asked for.
        guided: what the scoring text finds in T frames, by the trained branch beside the model: takes patches [T, n, C] and
            class tokens [T, C], float32, and gives how much each patch counts, [T, n] of sum 1, and a decoder input for each
            frame, [T, D]. None unless asked for.
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    seed: bytes
    cls_attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    frames: int = 1
    projected: torch.Tensor | None = None
    text: torch.Tensor | None = None
    asked: Asked | None = None
    aligned: torch.Tensor | None = None
    aligned_text: torch.Tensor | None = None
    selected: Asked | None = None
    unpooled: torch.Tensor | None = None
    coded: Coded | None = None
    class_token: torch.Tensor | None = None
    guided: Guided | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """Decoder inputs that come out of trained weights beside the model, not out of its own projector.

    Attributes:
        rows: [m] int64, ascending, places in ``VisualPlan.indices``.
        embeds: [m, D] float32.
    """

    rows: torch.Tensor
    embeds: torch.Tensor


@dataclass(frozen=True, slots=True)
class VisualPlan:
    """Which tokens of an image or video survive, and how others are folded into them.

    Attributes:
        indices: [k] int64, ascending, unique raster indices into ``tokens``; survivors keep these positions.
        weights: None, or [k, N] float32; survivor i becomes ``weights[i] @ tokens``.
        order: of a ``nested`` method that merges nothing, [k] int64, places in ``indices``, the first to keep first: a
            budget of m keeps the first m of them. None if that is not said.
        written: survivors whose decoder inputs the method gives itself; ``weights`` then only says what they were made
            from. None if there are none.
    """

    indices: torch.Tensor
    weights: torch.Tensor | None = None
    order: torch.Tensor | None = None
    written: Written | None = None

    @classmethod
    def in_order(cls, chosen: torch.Tensor) -> VisualPlan:
        """The plan that keeps these indices, [k] int64, given in the order in which they were chosen."""
        indices, places = chosen.sort()
        return cls(indices, order=places.argsort())


class KeepConfig(FrozenConfig):
    """Budget of a visual method: ``keep`` is a count (int, 1 to 1048576) or a share (float, above 0, at most 1.0).

    A count above the image's tokens keeps them all. ``1`` is one token, ``1.0`` is all of them; because the two are
    equal in Python, and so in every table keyed by a spec, a share of 1.0 is stored as the largest count.
    """

    keep: int | float = Field(default=0.25, gt=0)

    @field_validator("keep", mode="before")
    @classmethod
    def _count_or_share(cls, value: Any) -> int | float:
        if isinstance(value, int) and not isinstance(value, bool):
            if 1 <= value <= KEEP_MAX:
                return value
        elif isinstance(value, float) and math.isfinite(value) and 0.0 < value <= 1.0:
            return value if value < 1.0 else KEEP_MAX
        kind = "keep"
        reason = "must be a count of tokens (integer, 1 to 1048576) or a share of them (float above 0.0, at most 1.0)"
        raise PydanticCustomError(kind, reason)

    def kept(self, tokens: int) -> int:
        """Tokens kept of ``tokens``: at least 1, at most all."""
        wanted = self.keep if isinstance(self.keep, int) else round(self.keep * tokens)
        return max(1, min(tokens, int(wanted)))


SAME_CODEC: Final = "same"
"""The value of ``WireConfig.text`` for: text is encoded as images are."""


class WireConfig(FrozenConfig):
    """What every lossy codec takes beside its own parameters; :mod:`prismserve.compression.wire` carries it out.

    Attributes:
        residual: this many last tokens of the prompt are sent exactly (KIVI's residual window).
        text: codec of text tokens, with its defaults: a codec's name, or "same".
    """

    residual: int = Field(default=0, ge=0, le=65536, strict=True)
    text: str = Field(default=SAME_CODEC, min_length=1, max_length=64)


class Method(Protocol):
    """What a method of any stage declares; ``prismserve methods`` prints it.

    Attributes:
        name: the file's name, and the name in requests.
        version: raised when the same configuration would give other results; part of every cache key.
        stage: the folder it lies in.
        section: where the survey of Pathak and Han treats it (``"IV-A.1a"``); ``"control"`` for what others are
            measured against, ``"own"`` for what is ours.
        source: the paper in one line, with its arXiv number; empty for controls.
        training_free: False where the model must have been trained with it, or where it has weights of its own.
        Config: its parameters.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    stage: ClassVar[Stage]
    section: ClassVar[str]
    source: ClassVar[str]
    training_free: ClassVar[bool]
    Config: ClassVar[type[FrozenConfig]]


class VisualMethod(Method, Protocol):
    """A method that reduces the tokens of one image. A file ``visual/<name>.py`` exports one as ``METHOD``.

    Attributes:
        share: ``AGNOSTIC`` or ``QUERY``. What ``needs`` the text is ``QUERY``: its results are kept under a key that
            holds the scoring text, and reach no other question.
        nested: whether a smaller budget keeps a subset of what a larger one keeps.
        needs: what the engine must provide, and no more.
    """

    share: ClassVar[Share]
    nested: ClassVar[bool]
    needs: ClassVar[frozenset[Need]]

    def kept_tokens(self, config: Any, tokens: int) -> int:
        """How many of ``tokens`` remain (of a video, of all its frames); exact, known before it is encoded."""
        ...

    def plan(self, features: VisualFeatures, config: Any) -> VisualPlan:
        """Choose; pure, deterministic, scores in float32, ties broken by index."""
        ...


class Codec(Method, Protocol):
    """An encoding of KV on the wire. A file ``codec/<name>.py`` exports one as ``METHOD``."""

    lossy: ClassVar[bool]

    def encoded_bytes(self, tokens: int, layout: KVLayout, config: Any) -> int:
        """Exact size of one layer's K and V of ``tokens`` tokens after encoding, in bytes."""
        ...

    def encode(self, keys: torch.Tensor, values: torch.Tensor, config: Any) -> torch.Tensor:
        """Encode one layer.

        Args:
            keys: [T, kv_heads, head_dim], after RoPE. A codec that is not ``lossy`` gets them as they lie in memory:
                from a quantised pool uint8 [T, kv_heads, row_bytes], codes followed by their scales.
            values: as ``keys``.
            config: an instance of ``Config``.

        Returns:
            uint8, 1-D, ``encoded_bytes`` long.
        """
        ...

    def decode(
        self, encoded: torch.Tensor, tokens: int, layout: KVLayout, config: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Invert :meth:`encode`: two [T, kv_heads, head_dim] tensors in the layout's dtype, or the rows it was given."""
        ...


@runtime_checkable
class EncodesParts(Protocol):
    """A codec that hands out its encoding in pieces, which saves a copy of everything that is sent."""

    def parts(self, keys: torch.Tensor, values: torch.Tensor, config: Any) -> Sequence[torch.Tensor]:
        """Tensors whose bytes one after another are what ``Codec.encode`` returns; the inputs themselves are allowed."""
        ...
