"""What each preset does on each model family, and the measured loss beside it: the one file to review.

A preset acts as strongly as the visual tokens of a family allow. Losses are points of exact match on the bundled model
(1,000 held-out questions in ten families of questions, 98.9 % without compression; an interval is about 1.6 points wide on
either side): ``benchmarks/results/quality.json``, rows of 98, 49 and 24 of 196 tokens. A test compares every number here with
that file. Of the methods that results of one request may be shared with another, each line takes the best there, or one within a
point of it.

The codec ``int8`` is beside these losses: over a KV pool of eight-bit codes the bundled model gave the same 600 answers as over
exact KV (``benchmarks/results/kv_dtype.json``); its codes are cut into groups otherwise.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from prismserve.core.types import MediaKind


class Basis(enum.StrEnum):
    """What a visual method finds to act on, from least to most."""

    NOTHING = "nothing"
    """Tokens have structure among them (tiles, ends of rows) that a reduction would break."""
    RASTER = "raster"
    """Tokens stand in one raster, and the encoder shows nothing of its attention."""
    SALIENCE = "salience"
    """It shows that too: of the class token, or without one the mean attention that each token receives."""

    @property
    def rank(self) -> int:
        """More allows more."""
        return tuple(Basis).index(self)


@dataclass(frozen=True, slots=True)
class Preset:
    """One preset on one basis.

    Attributes:
        visual: method that reduces visual tokens.
        keep: share of them that it keeps; 1.0 for all.
        codec: of KV between workers.
        lost_points: points of exact match lost by the visual method, over all questions.
        worst: families of questions that lose most, with the points they lose.
    """

    visual: str
    keep: float
    codec: str
    lost_points: float = 0.0
    worst: tuple[tuple[str, float], ...] = ()

    @property
    def text(self) -> str:
        """In words: ``visionzip 25 %, int8``."""
        visual = "" if self.visual == "none" else f"{self.visual} {100 * self.keep:g} %"
        codec = "" if self.codec == "none" else self.codec
        return ", ".join(filter(None, (visual, codec))) or "exact"

    @property
    def loss_text(self) -> str:
        """In words: ``0.9 points (count 6, relation 2)``; empty where nothing is reduced."""
        if self.visual == "none":
            return ""
        worst = ", ".join(f"{name} {points:g}" for name, points in self.worst)
        return f"{self.lost_points:g} points ({worst})"


EXACT: Final = Preset("none", 1.0, "none")

PRESETS: Final[Mapping[Basis, Mapping[str, Preset]]] = MappingProxyType(
    {
        # prism loses 0.5 and 1.0 at the first two budgets; visionzip 5.7 at the third, and 26.2 at half of it where prism
        # loses 13.2.
        Basis.SALIENCE: {
            "off": EXACT,
            "quality": Preset("visionzip", 0.5, "none", 0.3, (("count", 1), ("relation", 1))),
            "balanced": Preset("visionzip", 0.25, "int8", 0.9, (("count", 6), ("relation", 2))),
            "turbo": Preset("prism", 0.125, "int8", 4.7, (("count", 23), ("caption", 9))),
        },
        # Of the others that need nothing of the encoder, salience loses 0.4 and 2.1 at the first two budgets, dpp 10.0 at the
        # third, and divprune 1.6, 4.1 and 9.8.
        Basis.RASTER: {
            "off": EXACT,
            "quality": Preset("dpp", 0.5, "none", 0.4, (("count", 3), ("number", 1))),
            "balanced": Preset("dpp", 0.25, "int8", 2.1, (("count", 9), ("number", 5))),
            "turbo": Preset("salience", 0.125, "int8", 8.9, (("count", 31), ("caption", 21))),
        },
        Basis.NOTHING: {
            "off": EXACT,
            "quality": EXACT,
            "balanced": Preset("none", 1.0, "int8"),
            "turbo": Preset("none", 1.0, "int8"),
        },
    }
)


class Evidence(enum.StrEnum):
    """Where a family's losses come from."""

    MEASURED = "measured on the bundled model, which is of this family; carried over to its other checkpoints"
    CARRIED = "carried over from the bundled model, not measured: no checkpoint of this family answers here"
    NONE = "nothing is reduced"


@dataclass(frozen=True, slots=True)
class FamilyPresets:
    """What presets find in one family.

    Attributes:
        title: its models.
        images: in its images.
        videos: in its videos; None where it takes none.
        evidence: of the losses.
    """

    title: str
    images: Basis
    videos: Basis | None
    evidence: Evidence


FAMILIES: Final[Mapping[str, FamilyPresets]] = MappingProxyType(
    {
        "llava": FamilyPresets("LLaVA-1.5, the bundled model", Basis.SALIENCE, None, Evidence.MEASURED),
        "llava_next": FamilyPresets("LLaVA-NeXT", Basis.NOTHING, None, Evidence.NONE),
        "llava_onevision": FamilyPresets("LLaVA-OneVision", Basis.NOTHING, Basis.RASTER, Evidence.CARRIED),
        "qwen_vl": FamilyPresets("Qwen2-VL, Qwen2.5-VL, Qwen3-VL", Basis.RASTER, Basis.RASTER, Evidence.CARRIED),
        "gemma3": FamilyPresets("Gemma 3", Basis.RASTER, None, Evidence.CARRIED),
        "internvl": FamilyPresets("InternVL3", Basis.NOTHING, Basis.RASTER, Evidence.CARRIED),
        "idefics3": FamilyPresets("Idefics3, SmolVLM", Basis.NOTHING, Basis.RASTER, Evidence.CARRIED),
        "mistral3": FamilyPresets("Mistral 3", Basis.NOTHING, None, Evidence.NONE),
    }
)
"""By the name of the family's file; a family that is not here gets what its encoder allows."""

_SALIENT: Final = frozenset({"cls_attention", "encoder_keys"})


def basis_of(family: str, able: Mapping[MediaKind, frozenset[str] | None]) -> Basis:
    """What presets find in a request: the least of what its media allow.

    Args:
        family: name of the model's family.
        able: of each kind of media the request holds, what the encoder gives to methods; None where none may act.
    """
    entry = FAMILIES.get(family)
    if entry is None:
        found = [allowed(needs) for needs in able.values()]
    else:
        own = {MediaKind.IMAGE: entry.images, MediaKind.VIDEO: entry.videos or Basis.NOTHING}
        found = [own[kind] for kind in able]
    return min(found, key=lambda basis: basis.rank, default=Basis.NOTHING if entry is None else entry.images)


def allowed(needs: frozenset[str] | None) -> Basis:
    """The basis of an encoder that gives ``needs`` to methods; None lets none act."""
    if needs is None:
        return Basis.NOTHING
    return Basis.SALIENCE if needs >= _SALIENT else Basis.RASTER


def described(family: str) -> dict[str, dict[str, Any]]:
    """Each preset on one family's images and videos, for documents: plan and loss in words, and the evidence."""
    entry = FAMILIES.get(family)
    if entry is None:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name in PRESETS[entry.images]:
        images = PRESETS[entry.images][name]
        told = {"images": images.text, "images_loss": images.loss_text}
        if entry.videos is not None:
            videos = PRESETS[entry.videos][name]
            told |= {"videos": videos.text, "videos_loss": videos.loss_text}
        found[name] = {**told, "evidence": entry.evidence.value}
    return found
