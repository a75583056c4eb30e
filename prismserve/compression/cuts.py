"""Methods that drop or merge visual tokens between decoder layers during prefill: what they declare and what they see.

A method states its *cuts*: before which layers the visual tokens of a prompt become fewer, and what it must know there.
Layers below a cut keep the KV of all tokens, layers from it on that of the survivors. A cut sees the whole prompt of one
sequence and nothing of tokens generated later; text is never touched. Survivors keep their positions.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch

from prismserve.compression.base import Method

if TYPE_CHECKING:
    from prismserve.compression.base import Share


class Tap(enum.StrEnum):
    """Whose queries and keys a cut scores with; the two differ, since each layer has its own."""

    NONE = "none"
    BEFORE = "before"
    """Those of the layer before the cut: the attention that has just been computed (FastV)."""
    AFTER = "after"
    """Those the layer after the cut would have, from the hidden states that enter it (PyramidDrop)."""


class Raters(enum.StrEnum):
    """Which rows of the prompt score its visual tokens."""

    NONE = "none"
    LAST = "last"
    """The prompt's last token (recipe R1)."""
    QUESTION = "question"
    """The text behind the last image, at most its last ``RATERS_MAX`` tokens (R3)."""
    CHOSEN = "chosen"
    """Those of the question that the method chooses itself: it is a :class:`ChoosesRaters` (R3)."""


RATERS_MAX = 256
"""Most rows that score at one cut: bounds the scores to rows x heads x visual tokens."""


class CutNeed(enum.StrEnum):
    """What else a cut must see."""

    HIDDEN = "hidden"
    KEYS = "keys"
    QUERY_SUMS = "query_sums"
    ROPE_SCORES = "rope_scores"


@dataclass(frozen=True, slots=True)
class Cut:
    """Before decoder layer ``layer`` the visual tokens become fewer.

    Attributes:
        layer: 0 to layers - 1; above 0 where ``tap`` is ``BEFORE``.
        tap: whose queries and keys are scored with.
        raters: which rows score.
        needs: what else the plan must see.
        blend: above 0, in the layer before the cut a visual token also attends to later visual tokens, with weights
            scaled by ``blend`` times their salience (ASAP); asks for ``QUERY_SUMS``.
    """

    layer: int
    tap: Tap = Tap.NONE
    raters: Raters = Raters.NONE
    needs: frozenset[CutNeed] = frozenset()
    blend: float = 0.0


@dataclass(frozen=True, slots=True)
class Grid:
    """How the tokens of one image or video lie: frame by frame, row by row."""

    frames: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Places there are."""
        return self.frames * self.rows * self.columns


@dataclass(frozen=True, slots=True)
class CutInputs:
    """The N visual tokens of one sequence as they arrive at a cut, all images and videos of the prompt in order.

    Attributes:
        layers: of the decoder.
        cut_layers: layers of the cuts up to and including this one, as this decoder allows them.
        history: visual tokens at layer 0 and behind each earlier cut; the last entry is N.
        grids: one per image or video.
        medium: [N] int64, which of ``grids`` a token belongs to, ascending.
        places: [N] int64, its raster place there (frame, row, column), ascending within a medium. Of a merged token,
            that of the one it was folded into.
        sizes: [N] float32, how many tokens of layer 0 it stands for.
        seed: 8 bytes from the pixels, the only randomness a method may use.
        scores: [r, H, N] float32, attention probabilities of the rating rows over everything they may see, cut down to
            the visual tokens.
        rope_scores: [r, N] float32, the same for queries and keys of ones before RoPE: what position alone does.
        hidden: [N, D] what enters the layer after the cut.
        keys: [N, kv_heads, d] after RoPE, of the tapped layer.
        query_sums: [H, N] float32, ``sum_i q_i . k_j / sqrt(d)`` over all visual rows i at the tapped layer (R5).
    """

    layers: int
    cut_layers: tuple[int, ...]
    history: tuple[int, ...]
    grids: tuple[Grid, ...]
    medium: torch.Tensor
    places: torch.Tensor
    sizes: torch.Tensor
    seed: bytes
    scores: torch.Tensor | None = None
    rope_scores: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    query_sums: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """N."""
        return self.history[-1]


@dataclass(frozen=True, slots=True)
class CutPlan:
    """Which visual tokens go on, and what is folded into them.

    Attributes:
        indices: [k] int64, ascending and unique.
        targets: [N] int64, number among the survivors that a token is folded into, -1 if it is dropped; None where
            survivors stay as they are.
        weights: [N] float32, a token's share: survivor i becomes the sum of ``weights[j] * hidden[j]`` over the j folded
            into it, itself included.
    """

    indices: torch.Tensor
    targets: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class PrefillMethod(Method, Protocol):
    """A method that reduces visual tokens inside the decoder. A file ``prefill/<name>.py`` exports one as ``METHOD``.

    Attributes:
        share: what the KV above the first cut depends on.
        nested: whether a smaller budget keeps a subset.
        exact: whether ``kept_tokens`` is what remains; otherwise at most that many do.
        whole: whether it needs every token of an image's grid, so that no visual method may come before it.
    """

    share: ClassVar[Share]
    nested: ClassVar[bool]
    exact: ClassVar[bool]
    whole: ClassVar[bool]

    def cuts(self, config: Any, layers: int) -> tuple[Cut, ...]:
        """Cuts in a decoder of ``layers`` layers, their layers strictly ascending.

        Raises:
            InvalidRequestError: the configuration names a layer there is not.
        """
        ...

    def kept_tokens(self, config: Any, layers: int, tokens: int) -> tuple[int, ...]:
        """What remains of ``tokens`` visual tokens behind each cut, known before anything is computed."""
        ...

    def plan(self, cut: int, inputs: CutInputs, config: Any) -> CutPlan:
        """Choose at cut number ``cut``; pure, deterministic, scores in float32, ties broken by index."""
        ...


@runtime_checkable
class ChoosesRaters(Protocol):
    """A method with ``Raters.CHOSEN``."""

    def raters(self, visual: torch.Tensor, text: torch.Tensor, config: Any) -> torch.Tensor:
        """Rows of the question that score.

        Args:
            visual: [N, D] decoder inputs of the visual tokens.
            text: [M, D] of the text behind the last image.
            config: an instance of ``Config``.

        Returns:
            [r] int64 rows of ``text``, ascending, 1 to ``RATERS_MAX``.
        """
        ...


def salience(query_sums: torch.Tensor) -> torch.Tensor:
    """[N] float32 in 0..1: mean over heads of ``query_sums`` [H, N], spread over the range; all 1 where they are equal."""
    mean = query_sums.float().mean(0)
    low, high = mean.aminmax()
    return torch.ones_like(mean) if bool(high == low) else (mean - low) / (high - low)
