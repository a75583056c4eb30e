"""Which methods a request asks for."""

from __future__ import annotations

from dataclasses import dataclass, field

from prismserve.core.hashing import canonical_json, digest
from prismserve.core.types.names import Scalar


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A compression method or codec by name, with its parameters, normalised (sorted, defaults filled in)."""

    name: str
    params: tuple[tuple[str, Scalar], ...] = ()

    def fingerprint(self) -> bytes:
        """32 bytes that name the method and every parameter."""
        return digest("method", self.name.encode(), canonical_json(dict(self.params)))


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """What is done to one request's visual tokens, before the decoder and within it, and to its KV on the wire.

    All are always set; ``none`` is the identity. Visual fingerprints enter the keys of images, prefill fingerprints the
    request's namespace (:func:`prefill_namespace`). Wire codecs do neither: they change bytes in flight, and lossy
    codecs mark what they produce (see ``lossy``).
    """

    visual: MethodSpec = field(default_factory=lambda: MethodSpec("none"))
    wire: MethodSpec = field(default_factory=lambda: MethodSpec("none"))
    preset: str = "custom"
    prefill: MethodSpec = field(default_factory=lambda: MethodSpec("none"))

    @property
    def exact(self) -> bool:
        """Whether outputs are bit-equal to serving without compression."""
        return self.visual.name == self.prefill.name == self.wire.name == "none"
